"""Say for every part of a prompt whether its KV is loaded, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from ragcache.core.seen_parts import SeenParts
from ragcache.engine.base import ChunkEngine
from ragcache.planning.lookup import PromptLookup
from ragcache.store.base import ABSENT, Miss
from ragcache.store.key import ChunkKey
from ragcache.types import PartReport, Prompt, Tokens

__all__ = ["PartHistory", "chunk_names", "part_reports"]

_SHOWN = 6  # tokens before and after an edit that are shown
_MOST_SHOWN = 60  # characters of each side


@dataclass(frozen=True, slots=True)
class PartHistory:
    """Explains why a part is not stored, from the parts of earlier prompts of this process."""

    engine: ChunkEngine
    #: Whether an indexed document has the text that a key has the tokens of.
    is_indexed: Callable[[ChunkKey], bool]
    seen: SeenParts = field(default_factory=SeenParts)

    def reason(self, key: ChunkKey, name: str = "") -> str:
        """Why nothing is stored for the tokens of ``key``, in words."""
        if self.seen.was_stored(key):
            return "evicted or deleted: it was stored before"
        if self.is_indexed(key):
            return "evicted, or not computed yet: the text of an indexed document"
        if self.seen.was_stored(key) is not None:
            return "not kept, or evicted: an earlier prompt had it, and it is not stored"
        similar = self.seen.similar(key.tokens, name)
        if similar is None:
            return "never seen before"
        if similar == key.tokens:
            return "seen before behind other text only"
        return self._edit(key.tokens, similar)

    def _edit(self, tokens: Tokens, before: Tokens) -> str:
        pairs = zip(tokens, before, strict=False)
        at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        now, then = self._text(tokens, at), self._text(before, at)
        return f"edited: differs from a part seen before at token {at} ({now} was {then})"

    def _text(self, tokens: Tokens, at: int) -> str:
        text = "".join(self.engine.pieces(tokens[max(0, at - _SHOWN) : at + _SHOWN]))
        return repr(text[:_MOST_SHOWN]) if at < len(tokens) else f"{text[:_MOST_SHOWN]!r}, the end,"

    def remember(
        self, found: PromptLookup, names: Sequence[str], missed: Container[int] = ()
    ) -> None:
        """Remember the parts of a prompt of which a later prompt may load the KV. ``missed``: the
        chunks that were computed before the prompt."""
        for number, key in enumerate(found.text_keys):
            self.seen.add(key, stored=number < len(found.texts))
        for number, (key, name) in enumerate(zip(found.keys, names, strict=True)):
            self.seen.add(key, name, stored=not (number in found.misses or number in missed))


def part_reports(
    found: PromptLookup,
    names: Sequence[str],
    history: PartHistory | None = None,
    missed: Mapping[int, Miss] | None = None,
) -> tuple[PartReport, ...]:
    """A report of every part of a prompt, in order. ``names``: of the chunks; ``missed``: chunks
    that were computed before the prompt. Without a ``history``, the reasons are those of the store
    alone."""
    computed = missed or {}

    def why(key: ChunkKey, miss: Miss, name: str = "") -> str:
        return (
            history.reason(key, name) if history and miss == ABSENT else miss.detail or miss.reason
        )

    def of_chunk(number: int, tokens: int) -> PartReport:
        name, key = names[number], found.keys[number]
        if (miss := computed.get(number)) is not None:
            reason = f"{why(key, miss, name)}; computed before the prompt, as it would be stored"
            return PartReport("chunk", name, tokens, 0, reason)
        if (miss := found.misses.get(number)) is not None:
            return PartReport("chunk", name, tokens, 0, why(key, miss, name))
        if number in found.cheaper:
            reason = "stored, but cheaper to compute than to load"
            return PartReport("chunk", name, tokens, 0, reason)
        return PartReport("chunk", name, tokens, tokens)

    def of_text(number: int, name: str, tokens: int, *, last: bool, gap: bool) -> PartReport:
        if number < len(found.texts):
            return PartReport("text", name, tokens, tokens)
        if last:
            reason = "the last part of a prompt is always computed"
        elif found.layout.kept:
            reason = "text behind an earlier turn is computed"
        elif not found.text_keys:
            reason = "this mode loads no text"
        elif number >= len(found.text_keys):
            reason = "text after a chunk is computed"
        elif gap:
            reason = "a part before it is not stored"
        else:
            reason = why(found.text_keys[number], ABSENT)
        return PartReport("text", name, tokens, 0, reason)

    prompt, reports = found.layout.prompt, list[PartReport]()
    chunks = texts = 0
    for part, name, (start, stop) in zip(
        prompt.parts, _text_names(prompt), prompt.part_spans, strict=True
    ):
        if (kept := min(stop, found.layout.kept) - start) > 0:
            kind: Literal["text", "chunk"] = "chunk" if part.is_chunk else "text"
            reason = "" if kept == stop - start else "its beginning is that of an earlier turn"
            named = names[chunks] if part.is_chunk else name
            reports.append(PartReport(kind, named, stop - start, kept, reason))
            chunks, texts = chunks + part.is_chunk, texts + (not part.is_chunk)
        elif part.is_chunk:
            reports.append(of_chunk(chunks, len(part.tokens)))
            chunks += 1
        else:
            last = len(reports) == len(prompt.parts) - 1
            gap = not all(report.loaded for report in reports)
            reports.append(of_text(texts, name, len(part.tokens), last=last, gap=gap))
            texts += 1
    return tuple(reports)


def chunk_names(prompt: Prompt, ids: Sequence[str]) -> list[str]:
    """The names of a prompt's chunks: the ``ids`` of its passages, or else numbers from 1."""
    return list(ids) or [str(number + 1) for number in range(len(prompt.chunks))]


def _text_names(prompt: Prompt) -> list[str]:
    """A name for every part, for those that are texts: the last part is the question, and the
    only text before the first chunk are the instructions; others have numbers."""
    names, texts = list[str](), 0
    for number, part in enumerate(prompt.parts):
        texts += not part.is_chunk
        if number == len(prompt.parts) - 1:
            names.append("question")
        elif number == 0 and len(prompt.lead) == 1 + (not prompt.chunks):
            names.append("instructions")
        else:
            names.append(f"text {texts}")
    return names
