"""Measure what rules of choosing rows reach on a real model, with those that know full prefill.

``python -m bench.rules --model MODEL --set FILE --out FILE`` asks the questions of a data set
(``python -m bench.questions``) in ragcache's own prompt, over chunks in the default encoding
context. Each rule chooses the same number of rows, 5, 10 and 15 % of the chunks' tokens, which are
computed at all layers. The oracles know what only full prefill computes: what they gain is what
better estimates of it could.

What a rule costs is not included. Rules of attention need a probe of the question, which computes
as many rows as the question has tokens. ``sensitivity`` is ``fused:attention=0``. The shipped
``fused`` chooses later: once the question has seen repaired KV, and while the answer is decoded.

Outcomes are saved after every question; the same command goes on where it was stopped. ``--only
TEXT`` asks only the variants whose label contains TEXT. ``python -m bench.rules --out FILE --table
PAGE`` writes the tables of what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.agreement import INSTRUCTION, Benchmark, Outcome, reply
from bench.observed import By, Observed, observe
from ragcache.blend import blender
from ragcache.blend.base import FixedRows
from ragcache.blend.ranking import highest
from ragcache.core.precompute import precompute
from ragcache.engine.base import Engine
from ragcache.planning.context import DEFAULT_CONTEXT, EncodingContext, encoding_context
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import Prompt

RATIOS = 0.05, 0.1, 0.15
NOTE = (
    "Rows are chosen for free: the cost of a probe, and of what an oracle knows, is not included."
)

Rule = Callable[[Observed], Tensor]  # to scores, (n,): the highest are chosen


def random(seen: Observed) -> Tensor:
    return torch.rand(len(seen.rows), generator=torch.Generator().manual_seed(0))


def half(seen: Observed) -> Tensor:
    """Half by sensitivity, half by the maximum attention weight too."""
    sensitive = torch.zeros(len(seen.rows), dtype=torch.bool)
    every = torch.arange(len(seen.rows))
    sensitive[highest(every, seen.sensitivity, seen.count - seen.count // 2)] = True
    return _above(sensitive, seen.peaks * seen.sensitivity.sqrt())


def attended_error(seen: Observed) -> Tensor:
    """To first order, the most that a token's error changes an attention output, over layers."""
    return (seen.true_peak * (seen.key_error.sqrt() + seen.value_error.sqrt())).sum(0)


def _above(chosen: Tensor, scores: Tensor) -> Tensor:
    """Scores that rank all tokens ``chosen``, (n,) bool, above the others."""
    ranked = scores.double()
    return ranked + chosen * (1 + ranked.max() - ranked.min())


RULES: Mapping[str, Rule] = {
    "random": random,
    "sensitivity": lambda seen: seen.sensitivity,
    "mean attention": lambda seen: seen.mean,
    "peak attention": lambda seen: seen.peaks,
    "mean attention * sqrt(u)": lambda seen: seen.mean * seen.sensitivity.sqrt(),
    "peak attention * sqrt(u)": lambda seen: seen.peaks * seen.sensitivity.sqrt(),
    "the same, middle layers": lambda seen: seen.middle_peaks * seen.sensitivity.sqrt(),
    "half": half,
    "first chunk, then sensitivity": lambda seen: _above(seen.chunk == 0, seen.sensitivity),
    "oracle: error of values": lambda seen: seen.value_error.mean(0),
    "oracle: error of keys": lambda seen: seen.key_error.mean(0),
    "oracle: attention * error": attended_error,
}
#: By label, the rule and the share of rows.
VARIANTS: Mapping[str, tuple[Rule, float]] = {
    "nothing": (random, 0.0),
    **{f"{name} {ratio:.0%}": (rule, ratio) for ratio in RATIOS for name, rule in RULES.items()},
}


def computed(engine: Engine, encoding: EncodingContext, prompt: Prompt) -> ChunkStore:
    """A store with the KV of a prompt's prefix and chunks."""
    store, fingerprint = MemoryStore(), engine.fingerprint
    keys = [encoding.key(fingerprint, chunk) for chunk in prompt.chunks]
    precompute(engine, store, [*keys, ChunkKey(fingerprint, prompt.prefix)])
    return store


def ask(
    engine: Engine, encoding: EncodingContext, prompt: Prompt, labels: Collection[str]
) -> dict[str, dict[str, float]]:
    """The agreement with full prefill of the variants ``labels``."""
    store = computed(engine, encoding, prompt)
    full = reply(engine, store, encoding, prompt, blender("full"), ())
    seen = observe(engine, store, encoding, prompt, full.tokens[:-1])
    found = {}
    for label, (rule, ratio) in VARIANTS.items():
        if label in labels:
            count = int(ratio * len(seen.rows))
            rows = highest(seen.rows, rule(replace(seen, count=count)), count)
            method = By(lambda *_, rows=rows: FixedRows(rows))
            said = reply(engine, store, encoding, prompt, method, full.tokens)
            found[label] = said.agreement(full)
    return found


def _asked(
    engine: Engine, chunks: Sequence[str], question: str, labels: Collection[str]
) -> Outcome:
    prompt = engine.template.prompt(chunks, question, INSTRUCTION)
    return ask(engine, encoding_context(DEFAULT_CONTEXT, engine), prompt, labels)


def _pairs(labels: Collection[str]) -> list[tuple[str, str]]:
    """Every rule minus ``half`` at the same ratio, of those that were measured."""
    pairs = [(f"{rule} {r:.0%}", f"half {r:.0%}") for r in RATIOS for rule in RULES]
    return [(one, other) for one, other in pairs if one != other and {one, other} <= set(labels)]


def main() -> None:
    Benchmark(__doc__, lambda: VARIANTS, _asked, _pairs, NOTE).main()


if __name__ == "__main__":
    main()
