"""Code blocks of Markdown pages: which run, which are files, and which do not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What a reader is shown first, and then every page of the site.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r'^```(?P<language>[\w{}-]*)(?: title="(?P<title>[^"]+)")?$')
_NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>\S.*) -->$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. ``title`` is a path: the block is that file, or a change to it."""

    page: Path
    line: int  # of its first line of text
    language: str
    title: str
    text: str
    not_run: str  # why not; empty where it runs

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order. ValueError where a fence is not closed, or is none of ours.

    ``<!-- not run: REASON -->`` on the line before a block says that it cannot run in a test.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        line = lines[number]
        number += 1
        if not line.startswith("```"):
            before = line or before
            continue
        fence = _FENCE.match(line)
        if fence is None or "```" not in lines[number:]:
            raise ValueError(f"{page.name}:{number}: {line!r} opens no block that can be read")
        end = lines.index("```", number)
        mark = _NOT_RUN.match(before)
        yield Block(
            page,
            number + 1,
            fence["language"],
            fence["title"] or "",
            "\n".join(lines[number:end]) + "\n",
            mark["reason"] if mark else "",
        )
        number, before = end + 1, ""


def change(file: Path, diff: str) -> None:
    """Make the change that a block in language diff shows, of lines that begin with ' ', + or -.

    ValueError where the lines that it starts from are not in ``file`` exactly once.
    """
    lines = diff.splitlines()
    old, new = (
        "".join(f"{line[1:]}\n" for line in lines if not line.startswith(sign)) for sign in "+-"
    )
    text = file.read_text(encoding="utf-8")
    if ("\n" + text).count("\n" + old) != 1:
        raise ValueError(f"{file.name} does not have these lines once:\n{old}")
    file.write_text(("\n" + text).replace("\n" + old, "\n" + new)[1:], encoding="utf-8")
