"""Control characters in documents and requests are escaped when they are printed."""

from __future__ import annotations

import io

from rich.table import Table

from ragcache.cli.render.screen import Screen, plain


def test_controls_are_written_out_wherever_they_are_printed() -> None:
    file = io.StringIO()
    console = Screen(file=file, width=80, markup=False)
    table = Table("a")
    table.add_row("cell \x1b[2J")
    console.print(table)
    console.print("line \x1b]0;title\x07 \x9b31m [b]no markup[/b]")
    text = file.getvalue()
    assert "\x1b" not in text and "\x07" not in text and "\x9b" not in text
    assert r"cell \x1b[2J" in text and r"\x1b]0;title\x07 \x9b31m [b]no markup[/b]" in text


def test_what_is_no_control_stays() -> None:
    text = "Zeile\n\t日本 é 👨‍👩‍👧"
    assert plain(text) == text
    assert plain("a\r\u202eb") == r"a\r\u202eb"
