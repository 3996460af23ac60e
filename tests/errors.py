"""List every error message that a user can meet, and whether a run met it.

``python -m tests.errors`` writes the list that tests/test_errors.py compares with, errors.txt.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ragcache import errors

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("errors.txt")

#: Classes whose messages users read: ragcache's own, and the service's.
CLASSES = {name for name, kind in vars(errors).items() if inspect.isclass(kind)} | {
    "ApiError",
    "QueueFull",
}

_NOT_MET = "  not met: "


@dataclass(frozen=True, slots=True)
class Site:
    """A place that makes an error. ``text`` is its message, with ``{expressions}`` in it."""

    file: str
    line: int
    kind: str
    text: str
    own: bool  # False: the whole message is made elsewhere

    @property
    def entry(self) -> str:
        return f"{self.file} {self.kind}: {self.text}"


@cache
def sites() -> tuple[Site, ...]:
    """All of them, in the order of files and lines."""
    return tuple(site for path in sorted((ROOT / "ragcache").rglob("*.py")) for site in _in(path))


def _in(path: Path) -> Iterator[Site]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    kinds = CLASSES | {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in CLASSES for base in node.bases)
    }
    calls = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
    ]
    for call in sorted(calls, key=lambda node: node.lineno):
        kind = ast.unparse(call.func)
        if kind in kinds:
            message = call.args[1 if kind == "ApiError" else 0]
            yield Site(
                path.relative_to(ROOT).as_posix(), call.lineno, kind, _text(message), _own(message)
            )


def _own(node: ast.expr) -> bool:
    return isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return f"{{{ast.unparse(node)}}}"


def listed() -> dict[str, str]:
    """Entries of the list, each with why no test meets it, or ""."""
    found: dict[str, str] = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith(_NOT_MET):
            found[list(found)[-1]] = line.removeprefix(_NOT_MET)
        else:
            found[line] = ""
    return found


def write() -> None:
    """The list as it has to be now; what is said of messages that are still there stays."""
    known = listed() if LIST.exists() else {}
    lines: list[str] = []
    for entry in dict.fromkeys(site.entry for site in sites()):
        reason = known.get(entry, "")
        lines += [entry, _NOT_MET + reason] if reason else [entry]
    LIST.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Met:
    """Where errors were made in this process since :meth:`watch`."""

    def __init__(self) -> None:
        self.places: set[tuple[str, int]] = set()

    def watch(self, kind: type[Exception]) -> None:
        """Note every place that makes an error of this class, or of one that derives from it."""

        def new(cls: type[Exception], *given: Any, **named: Any) -> Exception:
            caller = sys._getframe(1)
            self.places.add((caller.f_code.co_filename, caller.f_lineno))
            made: Exception = super(kind, cls).__new__(cls, *given)
            return made

        type.__setattr__(kind, "__new__", new)

    def missing(self) -> list[str]:
        """Entries that nothing met, and that the list does not give a reason for."""
        reasons = listed()
        met = {s.entry for s in sites() if (str(ROOT / s.file), s.line) in self.places}
        every = dict.fromkeys(site.entry for site in sites())
        return [entry for entry in every if entry not in met and not reasons.get(entry)]


MET = Met()

if __name__ == "__main__":
    write()
