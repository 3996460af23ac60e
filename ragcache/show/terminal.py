"""A console that shows what is in a text and does none of it.

Ids, titles, answers and messages come from documents, requests and models. A terminal obeys control
characters: it moves, colours, renames its window. Here they are printed as ``\\x1b``.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text


class Terminal(Console):
    """Rich's console, for texts of whoever. They are no markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def shown(text: str) -> str:
    """The text with its control characters, and what turns its direction, written out. Ends of
    lines and tabs stay."""
    return "".join(
        character if character in "\n\t" or not _acts(character) else _escaped(character)
        for character in text
    )


def _acts(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
        return True
    return character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
