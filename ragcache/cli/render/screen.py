"""Print texts of documents and models safely: without control characters, in any encoding."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

#: Control characters: C0, DEL, C1, and the embeddings, overrides and isolates of the bidirectional
#: algorithm. They would move the cursor, set colours, clear the screen or reverse text.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_LINE = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS}
_TEXT = {code: shown for code, shown in _LINE.items() if chr(code) not in "\n\t"}

#: Replacements for terminals whose encoding lacks a character that our own output uses.
_REPLACEMENTS = {"█": "#", "▒": ":", "░": ".", "━": "-", "╸": "-", "±": "+-", "µ": "u", "…": "~"}
_ERROR_HANDLER = "ragcache.replace"
_CLOSED = 141  # exit code after a broken pipe: 128 + SIGPIPE, as in shells


def plain(text: str) -> str:
    """``text`` with control characters except newlines and tabs escaped, such as ``\\x1b``."""
    return text.replace("\r\n", "\n").translate(_TEXT)


def one_line(text: str) -> str:
    """``text`` with all control characters escaped, for names."""
    return text.translate(_LINE)


class Screen(Console):
    """A rich console that passes every string, also in tables, through :func:`plain`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)

    def on_broken_pipe(self) -> None:
        """Exit quietly when the reader, such as ``head``, has closed the pipe."""
        discard_output(sys.stdout)
        raise SystemExit(_CLOSED)


def discard_output(stream: TextIO) -> None:
    """Discard all further output to ``stream``, including the flush at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def replace_unencodable(streams: Iterable[Any]) -> None:
    """Let text streams replace characters that their encoding lacks by similar ones, or escape
    them, such as ``\\u2026``. Streams that cannot be reconfigured are left unchanged."""
    codecs.register_error(_ERROR_HANDLER, _replace)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):
                stream.reconfigure(errors=_ERROR_HANDLER)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    replaced = (
        _REPLACEMENTS.get(one) or one.encode("ascii", "backslashreplace").decode() for one in bad
    )
    return "".join(replaced), error.end
