"""Find the blocks of Markdown: where a part of a long text may begin."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator

_FENCE = re.compile(
    r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<fence>`{3,}|~{3,})(?P<info>.*)$", re.MULTILINE
)
_BLOCK = re.compile(r"^#|(?<=\n\n)\S", re.MULTILINE)


def code_blocks(text: str) -> Iterator[tuple[int, int]]:
    """Start and end offsets of Markdown's fenced code blocks, in order."""
    opened: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        fence, info = line["fence"], line["info"]
        if opened is None:
            if fence[0] == "~" or "`" not in info:
                opened = line
        elif fence.startswith(opened["fence"]) and not info.strip():
            yield opened.start(), line.end()
            opened = None
    if opened is not None:
        yield opened.start(), len(text)


def next_block(text: str, at: int, code: list[tuple[int, int]]) -> int:
    """The offset, at or after ``at``, of the next Markdown block outside of ``code``.

    The length of the text if there is none.
    """
    while (begin := _BLOCK.search(text, at)) is not None:
        before = bisect_left(code, begin.start(), key=lambda block: block[0])
        if not before or code[before - 1][1] <= begin.start():
            return begin.start()
        at = code[before - 1][1]
    return len(text)
