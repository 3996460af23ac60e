"""Write notebooks of alternating text and code, with the outputs of running the code."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def notebook(cells: Sequence[str]) -> dict[str, Any]:
    """A notebook of ``cells``, alternately Markdown and Python, run in the working directory."""
    names: dict[str, Any] = {}
    made: list[dict[str, Any]] = []
    for n, source in enumerate(cells):
        cell = {"id": f"cell-{n}", "metadata": {}, "source": _lines(source)}
        if n % 2 == 0:
            made.append({"cell_type": "markdown", **cell})
        else:
            outputs = run(source, names, n // 2 + 1)
            code = {"cell_type": "code", "execution_count": n // 2 + 1, "outputs": outputs}
            made.append({**code, **cell})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write(cells: Sequence[str], target: Path) -> None:
    """Run the notebook in an empty folder, and write it to ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = notebook(cells)
        os.chdir(target.parent)
    target.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(code: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The outputs that a notebook shows of one cell."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(text)})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number}
        outputs.append({**result, "metadata": {}, "data": _shown(value)})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    """A value in the MIME types that a notebook can show."""
    if hasattr(value, "savefig"):
        value.savefig(drawn := io.BytesIO(), format="png", dpi=80)
        return {"image/png": base64.b64encode(drawn.getvalue()).decode()}
    data: dict[str, Any] = {"text/plain": _lines(repr(getattr(value, "text", value)))}
    if html := getattr(value, "_repr_html_", lambda: None)():
        data["text/html"] = _lines(html)
    return data


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
