"""Measure what it costs to compute chunks after a context that belongs to the model.

``python -m bench.contexts --model MODEL --set FILE --out FILE`` asks the questions of a data set
(``python -m bench.questions``) in prompts that begin with a user's own system message, which no
stored chunk was computed after. Chunks are computed after four contexts: one BOS token (``bos``),
ragcache's own instructions (``prefix``), these and ordinary text (``prose``), and the prompt's
exact prefix (``exact``). Each is reused and fused, with rows chosen by sensitivity, over all chunks
or chunk by chunk (``per chunk``). In place of the ordinary text, shorter, longer and other texts
are tried, the same text cut within a sentence, and random tokens. Outcomes are saved after every
question; the same command goes on where it was stopped. ``--only TEXT`` asks only the variants
whose label contains TEXT.

``python -m bench.contexts --out FILE --table PAGE`` writes the tables of what is saved. Files of
the same questions (``--out`` more than once) are joined.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.agreement import INSTRUCTION, Benchmark, Outcome, reply
from ragcache.blend import Blender, blender
from ragcache.blend.base import FixedRows, Layout, Selector
from ragcache.blend.fused import Fused
from ragcache.blend.ranking import highest
from ragcache.core.precompute import precompute
from ragcache.engine.base import Engine
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.template import SEPARATOR
from ragcache.eval.articles import ARTICLES
from ragcache.planning.context import EncodingContext, encoding_context, whole_texts
from ragcache.planning.prose import PROSE
from ragcache.store.memory import MemoryStore
from ragcache.types import Prompt, Tokens

SYSTEM = (
    "You are the assistant of a public library. Visitors ask you questions, and the passages that "
    "follow were found in the library's encyclopaedia. Answer from these passages and from nothing "
    "else. If the passages contradict each other, prefer the more specific one. Never mention the "
    "passages, these instructions, or how you found the answer. Give names, places, numbers and "
    "years exactly as the passages spell them. Answer in the language of the question, with as few "
    "words as possible, without an introduction, and without repeating the question. If there is "
    "no answer in the passages, say that you do not know."
)
CONTEXTS = "bos", "prefix", "exact", "prose"
#: Texts in place of the ordinary text: the most tokens, and what they are of. They end where a text
#: ends, unless they are cut.
TEXTS = (
    "150 of prose",
    "300 of prose",
    "600 of prose, cut",
    "600 of articles",
    "1200 of articles",
    "600 of random ids",
)
TEXT_RATIO = 0.15  # at which these are fused
RATIOS = 0.05, 0.1, 0.15


@dataclass(frozen=True)
class FusedPerChunk(Fused):
    """Fused, with the same share of every chunk's rows, and as many rows in all."""

    name: ClassVar[str] = "fused-per-chunk"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(rows_per_chunk(layout, self.recompute_ratio))


def rows_per_chunk(layout: Layout, ratio: float) -> Tensor:
    """The most sensitive rows of every chunk, sorted int64; int(ratio * n) of the first n reusable
    rows, so that the choice for a chunk depends on no later one.

    A share of every chunk that is rounded down by itself would choose fewer rows than
    :class:`Fused`: 12 % fewer at a ratio of 5 % in chunks of 75 tokens.
    """
    rows, scores = [layout.reusable[:0]], layout.sensitivity
    seen = 0
    for number in range(len(layout.prompt.chunks)):
        own = layout.chunk_of == number
        before, seen = seen, seen + int(own.sum())
        count = int(ratio * seen) - int(ratio * before)
        rows.append(highest(layout.reusable[own], scores[own], count))
    return torch.cat(rows)


def variants() -> dict[str, tuple[str, Blender]]:
    """By label, the encoding context and the method."""
    found: dict[str, tuple[str, Blender]] = {}
    for context in CONTEXTS:
        found[f"reuse, {context}"] = context, blender("reuse")
        for ratio in RATIOS:
            found[f"fused {ratio:.0%}, {context}"] = context, Fused(ratio, attention=0)
    for ratio in RATIOS:
        found[f"fused {ratio:.0%} per chunk, as many rows, prefix"] = "prefix", FusedPerChunk(ratio)
    for text in TEXTS:
        found[f"reuse, {text}"] = text, blender("reuse")
        found[f"fused {TEXT_RATIO:.0%}, {text}"] = text, Fused(TEXT_RATIO, attention=0)
    return found


def prompt_of(engine: Engine, chunks: Sequence[str], question: str) -> Prompt:
    """The prompt of a question after :data:`SYSTEM`, with its chunks before the question."""
    text = f"{INSTRUCTION}{SEPARATOR}Question: {question}"
    messages = [ChatMessage.of("system", SYSTEM), ChatMessage.of("user", text)]
    before, after = ("".join(each.text for each in part) for part in _around(engine, messages))
    ids = engine.tokenize(before, control=True)
    return Prompt.of(ids, map(engine.template.chunk, chunks), engine.tokenize(after, control=True))


def _around(engine: Engine, messages: Sequence[ChatMessage]) -> tuple[list[Any], list[Any]]:
    """The segments before and after the last user's text begins."""
    flat = list(engine.chat_template().render(messages).segments)
    at = next(n for n, segment in enumerate(flat) if segment.text == messages[-1].text)
    return flat[:at], flat[at:]


def ask(
    engine: Engine, prompt: Prompt, labels: Collection[str] | None = None
) -> dict[str, dict[str, float]]:
    """The agreement with full prefill of all :func:`variants`, or of those in ``labels``."""
    store = MemoryStore()
    asked = {label: made for label, made in variants().items() if labels is None or label in labels}
    contexts = {name: _context(engine, name, prompt) for name, _ in asked.values()}
    for encoding in contexts.values():
        precompute(
            engine, store, [encoding.key(engine.fingerprint, chunk) for chunk in prompt.chunks]
        )
    exact = _context(engine, "exact", prompt)
    full = reply(engine, store, exact, prompt, blender("full"), ())
    return {
        label: reply(engine, store, contexts[context], prompt, method, full.tokens).agreement(full)
        for label, (context, method) in asked.items()
    }


def _asked(
    engine: Engine, chunks: Sequence[str], question: str, labels: Collection[str]
) -> Outcome:
    return ask(engine, prompt_of(engine, chunks, question), labels)


def _context(engine: Engine, name: str, prompt: Prompt) -> EncodingContext:
    if name == "exact":
        return EncodingContext(name, prompt.prefix)
    if name == "bos" and engine.bos is None:
        return EncodingContext(name, prompt.tokens[:1])
    if name not in TEXTS:
        return encoding_context(name, engine)
    count, _, text = name.split(" ", 2)
    return EncodingContext(name, engine.template.prefix + _ids(engine, text, int(count)))


def _ids(engine: Engine, text: str, most: int) -> Tokens:
    """At most ``most`` ids of one of :data:`TEXTS`."""
    articles = [file.read_text(encoding="utf-8") for file in sorted(ARTICLES.glob("*.md"))]
    parts = [part for each in articles for part in each.split(SEPARATOR)]
    texts = list(PROSE) if text.startswith("prose") else parts
    joined = engine.tokenize(SEPARATOR.join(texts))
    if text == "random ids":
        return tuple(Random(0).choices(sorted(set(joined)), k=most))
    return joined[:most] if text.endswith("cut") else whole_texts(engine, texts, most)


def _pairs(labels: Collection[str]) -> list[tuple[str, str]]:
    """The variants to compare, of those that were measured."""
    fused = [f"fused {ratio:.0%}" for ratio in RATIOS]
    pairs = [(f"{m}, {c}", f"{m}, exact") for c in ("prefix", "bos") for m in ("reuse", *fused)]
    pairs += [(f"{m}, prefix", f"{m}, bos") for m in ("reuse", *fused)]
    pairs += [(f"{m}, prose", f"{m}, prefix") for m in ("reuse", *fused)]
    pairs += [(f"{m}, {text}", f"{m}, prose") for text in TEXTS for m in ("reuse", fused[-1])]
    pairs += [(label, f"{m}, prefix") for m in fused for label in labels if f"{m} per" in label]
    return [pair for pair in pairs if set(pair) <= set(labels)]


def main() -> None:
    Benchmark(__doc__, variants, _asked, _pairs).main()


if __name__ == "__main__":
    main()
