"""A terminal that what documents say cannot command, and that can show every character."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

#: What moves the cursor, colours, clears, or turns the direction of writing: C0, DEL, C1, and the
#: embeddings, overrides and isolates of the bidirectional algorithm.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_LINE = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS}
_TEXT = {code: shown for code, shown in _LINE.items() if chr(code) not in "\n\t"}

#: What we draw and write with, for terminals whose encoding has no such character.
_ALIKE = {"█": "#", "▒": ":", "░": ".", "━": "-", "╸": "-", "±": "+-", "µ": "u", "…": "~"}
_ALIKE_ERRORS = "ragcache.alike"
_CLOSED = 141  # exit code where nobody reads on: 128 + SIGPIPE, as shells have it


def plain(text: str) -> str:
    """``text`` with control characters but newlines and tabs spelled out, such as ``\\x1b``."""
    return text.replace("\r\n", "\n").translate(_TEXT)


def one_line(text: str) -> str:
    """The same for names: newlines and tabs are spelled out too."""
    return text.translate(_LINE)


class Screen(Console):
    """A console on which every string is :func:`plain`, wherever in a table it stands."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(plain(text), **how)

    def on_broken_pipe(self) -> None:
        """Whoever read has gone, as ``head`` does: there is nobody to tell, and nothing to do."""
        discard_output(sys.stdout)
        raise SystemExit(_CLOSED)


def discard_output(stream: TextIO) -> None:
    """Let what is still to be written to ``stream`` go nowhere, the flush at exit included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def replace_unencodable(streams: Iterable[Any]) -> None:
    """Make text streams write every character: what their encoding lacks as one that looks alike,
    or spelled out, such as ``\\u2026``. Streams that cannot be changed are left alone."""
    codecs.register_error(_ALIKE_ERRORS, _alike)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):
                stream.reconfigure(errors=_ALIKE_ERRORS)


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    spelled = (_ALIKE.get(one) or one.encode("ascii", "backslashreplace").decode() for one in bad)
    return "".join(spelled), error.end
