"""Cuts long texts where their structure and content say, so that edits move few boundaries.

This is local-maximum chunking (Bjørner, Blass and Gurevich, "Content-dependent chunking for
differential compression, the local maximum approach", JCSS 2010). Every place where a text might be
cut has a priority: first its level, such as a document's tag or the end of a line, and then a hash
of the 64 characters on either side. A place becomes a boundary if no other within ``min_chars`` has
a higher priority. Boundaries are therefore at least ``min_chars`` apart, and typically twice that.
They depend on nearby text only: an edit changes the one or two parts around it, and no boundary
further away than 5 ``min_chars`` + 400 characters; text that is moved keeps its boundaries.

Where a text repeats itself, or has very long words, there may be no boundary for long. Pieces of
more than 8 ``min_chars`` are cut again, from their beginning on; there, an edit may change the
parts up to the piece's end.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from functools import partial
from itertools import pairwise
from zlib import crc32

from xxhash import xxh3_64_intdigest

from ragcache.text import encode_text

#: No part has more than this many times ``min_chars`` characters.
_MAX_FACTOR = 8

_CONTEXT = 64  # characters on either side that are hashed
_LINE = 256  # characters of a line that are looked at


class _Level(IntEnum):
    """What stands at a place where a text may be cut, from the least important."""

    CHARACTER = 0  # within a long word
    WORD = 1  # before a space, and after a comma or closing bracket
    SENTENCE = 2
    LINE = 3
    BLANK_LINE = 4  # after a blank line, before an indented one
    PARAGRAPH = 5  # after a blank line, before a line that is not indented
    CODE = 6  # before and after a fenced code block
    HEADING = 7  # before a Markdown heading, or several
    TAG = 8  # before a document's opening tag, and after its closing tag


#: A place in the text, and its level and hash in one number.
_Candidate = tuple[int, int]

#: Elements of web pages, whose tags stand in code rather than around documents.
_HTML = (
    "a|article|aside|body|button|code|div|footer|form|h[1-6]|head|header|html|img|input|label|li|"
    "link|main|meta|nav|ol|option|p|pre|script|section|select|span|style|svg|table|tbody|td|"
    "template|th|thead|title|tr|ul"
)
_OPENING = re.compile(rf"<(?!(?:{_HTML})\b)[A-Za-z][^<>]*(?<!/)>")
_CLOSING = re.compile(rf"</(?!(?:{_HTML})\b)[A-Za-z][^<>\s]*>\s*\Z")
_FENCE = re.compile(r"(?:`{3,}|~{3,})[ \t]*(?P<info>[^`\s]?)[^`\n]*$")
_HEADING = re.compile(r"(?:#{2,6}|(?P<top>#))[ \t]")

#: Ends of sentences: also those without spaces between, and those of texts within JSON strings.
_SENTENCE = re.compile(
    r"""[.!?…]["'”’)\]]{0,3}(?=\s)|[。！？][」』”’）]{0,3}|(?:\\r)?\\n(?!\\)"""  # noqa: RUF001
)
_WORD = re.compile(r"(?<=\S)(?=[ \t\u3000])|[,;，、；}\]>](?=\S)")  # noqa: RUF001


def boundaries(text: str, min_chars: int) -> list[int]:
    """The places at which ``text`` is cut, in order; neither 0 nor its length.

    They are at least ``min_chars`` characters apart, and at most 8 times that. The first and the
    last part may be shorter: near the ends of the text, it is cut at blank lines and what is above
    them in :class:`_Level`, and not at lines and sentences.
    """
    candidates = _candidates(text, min_chars)
    found = _local_maxima(candidates, min_chars)
    cuts: list[int] = []
    for start, end in pairwise([0, *found, len(text)]):
        if end - start > _MAX_FACTOR * min_chars:
            cuts += _cut_evenly(start, end, candidates, min_chars)
        cuts.append(end)
    return cuts[:-1]


def _candidates(text: str, min_chars: int) -> list[_Candidate]:
    """The places that may be boundaries, in order.

    A place within a line matters only if no line ends within ``min_chars`` of it: others are left
    out.
    """
    found = [
        (at, _priority(text, at, level))
        for at, level in _lines(text)
        if level > _Level.LINE or min_chars <= at <= len(text) - min_chars
    ]
    places: dict[_Level, Callable[[str, int, int], Iterator[int]]] = {
        _Level.SENTENCE: partial(_ends, _SENTENCE),
        _Level.WORD: partial(_ends, _WORD),
        _Level.CHARACTER: _characters,
    }
    for level, find in places.items():
        found = list(_fill(found, text, min_chars, level, find))
    return found


def _fill(
    candidates: Iterable[_Candidate],
    text: str,
    min_chars: int,
    level: _Level,
    find: Callable[[str, int, int], Iterator[int]],
) -> Iterator[_Candidate]:
    """Add candidates where there are none within ``min_chars``."""
    before = 0
    for candidate in (*candidates, (len(text), 0)):
        first, last = before + min_chars, candidate[0] - min_chars
        if first <= last:
            for at in find(text, first, last):
                yield at, _priority(text, at, level)
        if candidate[0] < len(text):
            yield candidate
        before = candidate[0]


def _ends(pattern: re.Pattern[str], text: str, first: int, last: int) -> Iterator[int]:
    """Where matches of a pattern end, from ``first`` to ``last``."""
    for match in pattern.finditer(text, max(0, first - 8), last + 8):
        if first <= match.end() <= last:
            yield match.end()


def _characters(text: str, first: int, last: int) -> Iterator[int]:
    """One place in 16, by the 8 characters before it."""
    start = max(0, first - 9)
    data = text[start:last].encode("utf-32-le", "surrogatepass")
    before = 0
    for at in range(start + 8, last + 1):
        hashed = crc32(data[4 * (at - 8 - start) : 4 * (at - start)])
        if at >= first and not hashed & 15 and hashed != before:  # equal in a run of one character
            yield at
        before = hashed


def _priority(text: str, at: int, level: _Level) -> int:
    around = text[max(0, at - _CONTEXT) : at + _CONTEXT]
    return level << 64 | xxh3_64_intdigest(encode_text(around))


def _lines(text: str) -> Iterator[tuple[int, _Level]]:
    """The beginnings of all lines that are not blank but the first, and their levels."""
    at = 0  # where the line begins
    end = 0  # where the last line that is not blank ended, without whitespace
    last = ""  # that line, unless it opens a code block; of a long one, its end behind a space
    blank = False  # whether a blank line has followed it
    for line in text.splitlines(keepends=True):
        head = line[:_LINE]
        if head.isspace():
            blank = True
        elif end:
            far = at - end > _CONTEXT
            yield at, _line_level("" if far else last, head, blank or far)
        if not line.isspace():
            last = line.rstrip()
            opens_code = (blank or not end) and last[:3] in ("```", "~~~")
            end, blank = at + len(last), False
            if opens_code:
                last = ""
            elif len(last) > _LINE:
                last = " " + last[-_LINE:]
        at += len(line)


def _line_level(before: str, line: str, blank: bool) -> _Level:
    """The level of the place between two lines. ``blank``: blank lines are between them too."""
    opens, closes = _opens(line), _closes(before)
    if (opens and not _opens(before)) or (closes and not _closes(line)):
        return _Level.TAG
    heading = _HEADING.match(line)
    if heading and (blank or not heading["top"]) and not _HEADING.match(before):
        return _Level.HEADING
    opening, closing = _FENCE.match(line), _FENCE.match(before)
    if (opening and (blank or opening["info"])) or (closing and not closing["info"]):
        return _Level.CODE
    if not blank:
        return _Level.LINE
    return _Level.BLANK_LINE if line[0].isspace() else _Level.PARAGRAPH


def _opens(line: str) -> bool:
    """Whether a line begins with an opening tag, which the same line does not close."""
    return line.startswith("<") and bool(_OPENING.match(line)) and not _CLOSING.search(line)


def _closes(line: str) -> bool:
    """Whether a line ends with a closing tag, which the same line has not opened."""
    line = line.rstrip()
    return line.endswith(">") and bool(_CLOSING.search(line)) and not _OPENING.match(line)


def _local_maxima(candidates: list[_Candidate], distance: int) -> list[int]:
    """The candidates without one of higher priority within ``distance``, in order.

    Of equal ones that are closer than that, the first.
    """
    before = [-distance] * len(candidates)  # the nearest that is not lower
    after: list[float] = [float("inf")] * len(candidates)  # the nearest that is higher
    falling: list[int] = []
    for number, (at, priority) in enumerate(candidates):
        while falling and candidates[falling[-1]][1] < priority:
            after[falling.pop()] = at
        if falling:
            before[number] = candidates[falling[-1]][0]
        falling.append(number)
    return [
        at
        for (at, _), left, right in zip(candidates, before, after, strict=True)
        if at - left >= distance and right - at >= distance
    ]


def _cut_evenly(
    start: int, end: int, candidates: list[_Candidate], min_chars: int
) -> Iterator[int]:
    """Cuts of a long piece: each at the best place 1 to 3 ``min_chars`` after the one before."""
    while end - start > 4 * min_chars:
        first = bisect_left(candidates, start + min_chars, key=lambda candidate: candidate[0])
        last = bisect_right(candidates, start + 3 * min_chars, key=lambda candidate: candidate[0])
        best = max(candidates[first:last], key=lambda candidate: candidate[1], default=None)
        start = best[0] if best else start + 2 * min_chars
        yield start
