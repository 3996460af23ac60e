"""A report as one HTML file: the code of the page at ``/demo`` together with the data it shows.

The file makes no network requests. Its Content-Security-Policy lets it run its own script and
nothing else, whatever the documents contain.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragcache.api.serialize import report_json, store_json
from ragcache.errors import ConfigError
from ragcache.text import replace_surrogates
from ragcache.util.private_file import open_private

if TYPE_CHECKING:
    from ragcache.rag import RagCache
    from ragcache.types import Answer

__all__ = ["check_report_path", "write_report"]

STATIC = files("ragcache.api") / "static"  # served at /demo; index.html is the page
#: The scripts that draw, in loading order; the others call the service.
DRAWING = "dom.js", "words.js", "prompt.js", "layers.js", "draw.js"
_TAG = re.compile(r'<script src="/demo/([a-z]+\.js)" defer></script>\n')


def check_report_path(path: Path) -> None:
    """Raise ConfigError, before any work, if :func:`write_report` could not write ``path``."""
    if path.is_dir():
        raise ConfigError(f"cannot write the report to {path}: it is a folder. Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot write the report to {path}: there is no folder {path.parent}")


def write_report(path: Path, asked: Mapping[str, Mapping[str, Answer]], cache: RagCache) -> None:
    """Write the page with the answers of ``cache`` by question, and by label of the mode. The first
    question, and the prompt of its first answer, are shown first.

    The file has the text of all chunks in the prompts, so its mode is 0600, whatever the umask and
    whatever its mode was before. Raises ConfigError if it cannot be written.
    """
    check_report_path(path)
    data = {
        "questions": [
            {
                "question": replace_surrogates(question),
                "runs": [
                    {
                        "mode": label,
                        "answer": answer.text,
                        "ragcache": report_json(answer, cache.engine, trace=True),
                    }
                    for label, answer in answers.items()
                ],
            }
            for question, answers in asked.items()
        ],
        "stats": store_json(cache.chunks, cache.traffic()),
    }
    try:
        with open_private(path, "wb") as file:
            file.write(report_html(data).encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write the report to {path}: {error.strerror}. Name a file in a folder that "
            "this user may write to."
        ) from error


def report_html(data: Mapping[str, Any]) -> str:
    """The page with its style, scripts and ``data`` inlined."""
    style, script = _text("demo.css"), "\n".join(map(_text, DRAWING))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    icon = b64encode(_text("icon.svg").encode()).decode()
    page, tags = _TAG.subn("", _text("index.html"))
    assert tags > len(DRAWING), "index.html loads its scripts in another form"
    found = page.split('content="', 1)[1].split('"', 1)[0]
    for old, new in (
        (found, policy),
        ('href="/demo/icon.svg"', f'href="data:image/svg+xml;base64,{icon}"'),
        ('<link rel="stylesheet" href="/demo/demo.css">', f"<style>{style}</style>"),
        ("<body>", '<body class="report">'),
    ):
        assert page.count(old) == 1, f"index.html has {page.count(old)} of {old}"
        page = page.replace(old, new)
    body, end = page.split("</body>")
    return (
        f'{body}<script type="application/json" id="ragcache-data">{_inline_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>{end}"
    )


def _inline_json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end its script element or begin a comment, whatever the data."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
