"""Find the two halves of a text, on both sides of a mark, in what a chat template rendered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ragcache.types import Segment


@dataclass(frozen=True, slots=True)
class Placed:
    """A slot's text in a rendering without marks."""

    slot: int
    start: int
    end: int
    segments: tuple[Segment, ...]


def halves_of(text: str) -> tuple[str, str]:
    """Cut a text that is not blank, outside the whitespace at its ends: if possible before a word,
    because the words of a template, such as ``</think>``, contain no whitespace."""
    start = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    middle = (start + end) // 2
    at = re.compile(r"\s\S").search(text, middle, end)
    cut = at.start() + 1 if at else middle
    return text[:cut], text[cut:]


def match_halves(
    number: int,
    segments: tuple[Segment, ...],
    halves: tuple[str, str],
    text: str,
    at: int,
    after: int,
) -> Placed | None:
    """The two halves on both sides of ``at`` in ``text``, not before ``after``."""
    left, right = halves
    for written in (str, _json):
        start = _ending(text, after, at, left, written)
        end = _beginning(text, at, right, written)
        if start is not None and end is not None:
            (first, dropped), (last, cut) = start, end
            kept = _trimmed(segments, dropped, cut)
            if written is _json:
                kept = tuple(_escaped(segment) for segment in kept)
            return Placed(number, first, last, kept)
    return None


def _ending(
    text: str, after: int, at: int, left: str, written: Callable[[str], str]
) -> tuple[int, int] | None:
    """Where ``left`` starts that ends at ``at``, and the characters trimmed from its beginning."""
    blank = len(left) - len(left.lstrip())
    core = written(left[blank:])
    start = at - len(core)
    if start < after or not text.startswith(core, start):
        return None
    while blank and start - len(sign := written(left[blank - 1])) >= after:
        if not text.startswith(sign, start - len(sign)):
            break
        start, blank = start - len(sign), blank - 1
    return start, blank


def _beginning(
    text: str, at: int, right: str, written: Callable[[str], str]
) -> tuple[int, int] | None:
    """Where ``right`` ends that starts at ``at``, and the characters trimmed from its end."""
    length = len(right.rstrip())
    core = written(right[:length])
    if not text.startswith(core, at):
        return None
    end = at + len(core)
    while length < len(right) and text.startswith(sign := written(right[length]), end):
        end, length = end + len(sign), length + 1
    return end, len(right) - length


def _trimmed(segments: tuple[Segment, ...], left: int, right: int) -> tuple[Segment, ...]:
    """The segments without this many characters at their beginning and at their end."""
    kept = []
    stop = sum(len(segment.text) for segment in segments) - right
    at = 0
    for segment in segments:
        start, end = max(at, left), min(at + len(segment.text), stop)
        if start < end:
            text = segment.text[start - at : end - at]
            kept.append(segment if text == segment.text else _shortened(segment, text, start > at))
        at += len(segment.text)
    return tuple(kept)


def _shortened(segment: Segment, text: str, at_beginning: bool) -> Segment:
    if segment.kind != "chunk":
        return replace(segment, text=text)
    stored = None if at_beginning else segment.stored or segment.text
    return replace(segment, text=text, stored=stored)


def _escaped(segment: Segment) -> Segment:
    text = _json(segment.text)
    return segment if text == segment.text else replace(segment, text=text, stored=None)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
