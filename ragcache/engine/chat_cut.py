"""Cut the text that a chat template renders at the texts that were put into it.

A template is a program, and its text can be cut only by trying it out. A *mark*, a number that
occurs in none of the texts, is inserted in the middle of each text, and the template is rendered.
If the rendering without the marks is equal to that of the texts themselves, and on both sides of
every mark are the two halves of its text, then the template's own text is what is between them.
Marks are in the middle because templates look at the ends of a text, and trim them.

Some templates change texts, for example drop the reasoning of earlier answers. Such a text is
rendered once more in place of a mark, and the rest of that rendering is compared.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ragcache.engine.chat_match import Placed, halves_of, match_halves
from ragcache.errors import PromptError
from ragcache.types import Segment

_DIGITS = 8  # of a mark's number
_ROUNDS = 4  # attempts to find the texts that a template changes, at most 4 renderings each

#: Renders with these texts in the slots. The function is applied to every other string that the
#: template is given, such as a tool's description.
Render = Callable[[Sequence[str], Callable[[str], str]], str]


@dataclass(frozen=True, slots=True)
class Slot:
    """A text that a template is to place once: a message's content, or a document."""

    segments: tuple[Segment, ...]
    name: str  # for error messages
    message: int | None = None  # index of the message whose content it is

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def cut_rendering(
    slots: Sequence[Slot], render: Render, control: Iterable[str]
) -> list[tuple[Segment, int]]:
    """The segments of what ``render`` makes of the slots' texts, and the message of each.

    The segments' joined text is equal to that rendering. The template's own text belongs to the
    message before it; text before the first message, to the first. Whitespace that the template
    trims is missing in the segments. A text that the template changes otherwise is one "text"
    segment; but one whose characters it escapes as JSON keeps its segments. Names of ``control``
    tokens outside the slots, that are not the template's own, become "text".

    Raises PromptError if the template drops or repeats a slot's text, or if its own text depends on
    a slot's text in a way that cannot be cut.
    """
    return _Cutter(slots, render, sorted(set(control), key=len, reverse=True)).cut()


@dataclass(frozen=True, slots=True)
class _Marked:
    """A rendering, from which the marks were removed."""

    text: str
    placed: tuple[Placed, ...]
    counts: Counter[int]  # of each slot's mark
    names: tuple[tuple[int, int], ...]  # ranges of control tokens' names that are not its own

    def unmatched(self, slots: Iterable[int]) -> set[int]:
        found = Counter(one.slot for one in self.placed)
        return {slot for slot in slots if found[slot] != 1 or self.counts[slot] != 1}


class _Cutter:
    def __init__(self, slots: Sequence[Slot], render: Render, control: Sequence[str]) -> None:
        self.slots, self.render, self.control = slots, render, control
        self.texts = [slot.text for slot in slots]
        self.marked = [number for number, text in enumerate(self.texts) if text.strip()]
        self.names = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        self.number = {name: len(slots) + index for index, name in enumerate(control)}
        self.real = render(self.texts, str)
        self.nonce = self._nonce()
        self.pattern = re.compile(rf"{self.nonce}(\d{{{_DIGITS}}})")

    def cut(self) -> list[tuple[Segment, int]]:
        halves = {number: halves_of(self.texts[number]) for number in self.marked}
        first = self._rendered(halves)
        changed = first.unmatched(self.marked)
        if not changed:
            if first.text == self.real:
                return self._segments(*_pieces(first))
            changed = {self._blamed(*_pieces(first)[:2])}
        for _ in range(_ROUNDS):
            glue, placed, names = self._with_changed(halves, changed)
            if _joined(glue, placed) == self.real:
                self._check_control([one for one in placed if one.slot in changed])
                return self._segments(glue, placed, names)
            blamed = self._blamed(glue, placed)
            if blamed in changed:
                break
            changed.add(blamed)
        name = self.slots[min(changed)].name
        raise PromptError(
            f"the chat template writes other text of its own because of the text of {name}, so the "
            f"prompt of {len(self.slots)} texts cannot be cut into parts. Change that text, or set "
            "another template."
        )

    # renderings with marks

    def _nonce(self) -> str:
        """A number that occurs in no text, and does not overlap itself: it has one 9."""
        while True:
            nonce = "9" + str(secrets.randbelow(10**15)).zfill(15).replace("9", "0")
            if nonce not in self.real and not any(nonce in text for text in self.texts):
                return nonce

    def _mark(self, number: int) -> str:
        return f"{self.nonce}{number:0{_DIGITS}d}"

    def _in_name(self, match: re.Match[str]) -> str:
        name = match[0]
        return name[:1] + self._mark(self.number[name]) + name[1:]

    def _rendered(self, halves: dict[int, tuple[str, str]]) -> _Marked:
        """Render with a mark between these halves, and the other texts as they are."""
        texts = list(self.texts)
        for number, (left, right) in halves.items():
            texts[number] = left + self._mark(number) + right
        rendered = self.render(texts, lambda text: self.names.sub(self._in_name, text))
        pieces = self.pattern.split(rendered)
        text, marks, at = "".join(pieces[::2]), list(map(int, pieces[1::2])), 0
        placed: list[Placed] = []
        names = []
        for number, piece in zip(marks, pieces[::2], strict=False):
            at += len(piece)
            if number in halves:
                segments = self.slots[number].segments
                if halves[number] == ("", ""):
                    found: Placed | None = Placed(number, at, at, ())
                else:
                    after = placed[-1].end if placed else 0
                    found = match_halves(number, segments, halves[number], text, at, after)
                placed += [found] if found else []
            elif number >= len(self.slots):
                name = self.control[number - len(self.slots)]
                if text.startswith(name, at - 1):
                    names.append((at - 1, at - 1 + len(name)))
        return _Marked(text, tuple(placed), Counter(marks), tuple(names))

    def _with_changed(
        self, halves: dict[int, tuple[str, str]], changed: set[int]
    ) -> tuple[list[str], list[Placed], list[list[tuple[int, int]]]]:
        """The pieces of the prompt, in which the ``changed`` texts are as the template has them."""
        base = self._rendered(halves | dict.fromkeys(changed, ("", "")))
        for number in self.marked:
            if base.counts[number] != 1:
                raise PromptError(
                    f"the chat template contains the text of {self.slots[number].name} "
                    f"{base.counts[number]} times, where it must be once: it drops, repeats or "
                    "changes that text. Leave the text out, or set another template."
                )
        if more := base.unmatched(self.marked):
            changed |= more
            base = self._rendered(halves | dict.fromkeys(changed, ("", "")))
        glue, placed, names = _pieces(base)
        order = [one.slot for one in placed]
        ranks = [rank for rank, number in enumerate(order) if number in changed]
        shorter = [[0, len(g)] for g in glue]  # what is left of the glue
        for turn in (ranks[::2], ranks[1::2]):  # so that the neighbours of each are marked
            if not turn:
                continue
            real = {order[rank] for rank in turn}
            blank = dict.fromkeys(changed, ("", ""))
            seen = self._rendered({n: h for n, h in (halves | blank).items() if n not in real})
            if [one.slot for one in seen.placed] != [n for n in order if n not in real]:
                continue  # the whole will not be equal
            ends = {one.slot: (one.start, one.end) for one in seen.placed}
            for rank in turn:
                start = ends[order[rank - 1]][1] if rank else 0
                end = ends[order[rank + 1]][0] if rank + 1 < len(order) else len(seen.text)
                region = seen.text[start:end]
                before = _common(region, glue[rank])
                after = _common(region[before:][::-1], glue[rank + 1][::-1])
                own = region[before : len(region) - after]
                placed[rank] = replace(placed[rank], segments=(Segment(own),))
                shorter[rank][1] = before
                shorter[rank + 1][0] = len(glue[rank + 1]) - after
        for at, (start, end) in enumerate(shorter):
            glue[at] = glue[at][start:end]
            names[at] = [(a - start, b - start) for a, b in names[at] if start <= a and b <= end]
        return glue, placed, names

    def _check_control(self, changed: Iterable[Placed]) -> None:
        """Texts that the template changed must not contain control tokens of its own."""
        for one in changed:
            given = Counter(self.names.findall(self.texts[one.slot]))
            if more := Counter(self.names.findall(_text(one))) - given:
                raise PromptError(
                    f"the chat template writes {next(iter(more))!r} into the text of "
                    f"{self.slots[one.slot].name}, so its control tokens cannot be told from the "
                    "text. Change that text, or set another template."
                )

    def _blamed(self, glue: Sequence[str], placed: Sequence[Placed]) -> int:
        """The slot at, or before, the first difference between this text and the real one."""
        first = _common(_joined(glue, placed), self.real)
        found, at = placed[0].slot if placed else 0, 0
        for text, one in zip(glue, placed, strict=False):
            at += len(text)
            if at > first:
                break
            found, at = one.slot, at + len(_text(one))
        return found

    # segments

    def _segments(
        self,
        glue: Sequence[str],
        placed: Sequence[Placed],
        names: Sequence[Sequence[tuple[int, int]]],
    ) -> list[tuple[Segment, int]]:
        messages = [m for one in placed if (m := self.slots[one.slot].message) is not None]
        message = messages[0] if messages else 0
        out: list[tuple[Segment, int]] = []
        for at, text in enumerate(glue):
            end = 0
            for a, b in [*names[at], (len(text), len(text))]:
                out.append((Segment(text[end:a], "template"), message))
                out.append((Segment(text[a:b]), message))
                end = b
            if at < len(placed):
                number = self.slots[placed[at].slot].message
                message = message if number is None else number
                out += [(segment, message) for segment in placed[at].segments]
        return [(segment, number) for segment, number in out if segment.text]


def _pieces(
    marked: _Marked,
) -> tuple[list[str], list[Placed], list[list[tuple[int, int]]]]:
    """The texts between the placed ones, the placed ones, and the names in each text between."""
    edges = [0, *(edge for one in marked.placed for edge in (one.start, one.end)), len(marked.text)]
    glue, names = [], []
    waiting = list(reversed(marked.names))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        glue.append(marked.text[start:end])
        inside = []
        while waiting and waiting[-1][0] < end:
            a, b = waiting.pop()
            inside.append((a - start, b - start))
        names.append(inside)
    return glue, list(marked.placed), names


def _joined(glue: Sequence[str], placed: Sequence[Placed]) -> str:
    texts = [*map(_text, placed), ""]
    return "".join(own + text for own, text in zip(glue, texts, strict=True))


def _text(placed: Placed) -> str:
    return "".join(segment.text for segment in placed.segments)


def _common(one: str, other: str) -> int:
    """The length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
