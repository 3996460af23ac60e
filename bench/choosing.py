"""The measurements by which `fused` was chosen: ``python -m bench.choosing``.

Every row changes one thing. The questions are from separate seeds, used neither for training the
model nor for the published tables, so that these are not biased by the choice.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor

from examples.train_tiny.freeze import prompt_lines
from examples.train_tiny.world import Binding
from ragcache.blend import Blender, blender
from ragcache.blend.base import Layout, RatioBlender, Selector
from ragcache.blend.cacheblend import deviation
from ragcache.blend.fused import Fused
from ragcache.blend.ranking import Band, QuestionAttention, band, highest, mean
from ragcache.cli import render
from ragcache.core.sensitivity import preceding_passage, relative_change
from ragcache.engine.base import Engine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval.ask import ask_questions
from ragcache.eval.dataset import EvalContext, load_dataset
from ragcache.eval.outcomes import AskedQuestion, by_mode
from ragcache.eval.parallel import run_parallel
from ragcache.eval.summary import ModeSummary, figures
from ragcache.models import TINY, model_path, world_file
from ragcache.store.disk.store import DiskStore
from ragcache.types import KVPair, Tokens
from ragcache.util.cores import usable_cores

SEED = 80_000_001  # the frozen prompts have 90,000,001 and on
KINDS: dict[Binding, int] = {"direct": 2, "local": 2, "split": 9}

#: Per passage, and chunk of the context that is being asked about: the squared change of every
#: token's value that the passage makes, (layers, tokens), as in ragcache.core.sensitivity.
CHANGES: dict[str, dict[Tokens, Tensor]] = {}


@dataclass(frozen=True)
class Sensitive(RatioBlender):
    """`fused` with its parts exchanged: rank by sensitivity * attention^``attention_power``."""

    taper: float = 0.0
    attention_power: float = 0.0
    passage: str = "shipped"
    layers: Band = "middle"
    name: ClassVar[str] = "sensitive"

    def selector(self, layout: Layout, layers: int) -> Selector:
        changes = [CHANGES[self.passage][chunk] for chunk in layout.prompt.chunks]
        changes[0] = torch.zeros_like(changes[0])  # it stands where it was computed
        looked_at = band(self.layers, layers)
        known = torch.cat([change[looked_at.start : looked_at.stop].mean(0) for change in changes])
        shares = tapered(self.recompute_ratio, layers, self.taper)
        counts = [int(share * len(layout.reusable)) for share in shares]
        count = counts[0] if self.attention_power else 0  # 0: no probe
        ranked = _Sensitive(layout, count, range(layers), mean, given=self, counts=counts)
        ranked.known = known
        return ranked


@dataclass
class _Sensitive(QuestionAttention):
    given: Sensitive = field(kw_only=True)
    counts: list[int] = field(kw_only=True)
    known: Tensor = field(init=False)

    def first(self) -> Tensor:
        if self.given.attention_power:
            self.known = self.known * self.scores**self.given.attention_power
        return highest(self.layout.reusable, self.known, self.counts[0])

    def narrows(self, layer: int) -> bool:
        return layer + 1 < len(self.counts) and self.counts[layer + 1] < self.counts[layer]

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        at = torch.searchsorted(self.layout.reusable, rows)
        return highest(rows, self.known[at], self.counts[layer + 1])


@dataclass(frozen=True)
class AttendedError(RatioBlender):
    """Ranks without stored sensitivity: by question attention^p * value error^q, as observed.

    To first order, the change of an attention output is attention times the error of what is
    attended to. Attention comes from a probe in which the question sees the share ``anchors`` of
    every chunk; from layer 1 on the errors of the rows that are computed are known.
    """

    recompute_ratio: float = 0.12
    taper: float = 2.0
    attention_power: float = 0.5
    error_power: float = 0.5
    layers: Band = "all"
    anchors: float = 0.15
    name: ClassVar[str] = "attended_error"

    def selector(self, layout: Layout, layers: int) -> Selector:
        shares = tapered(self.recompute_ratio, layers, self.taper)
        counts = [int(share * len(layout.reusable)) for share in shares]
        looked_at = band(self.layers, layers)
        return _AttendedError(
            layout, counts[0], looked_at, mean, self.anchors, given=self, counts=counts
        )


@dataclass
class _AttendedError(QuestionAttention):
    given: AttendedError = field(kw_only=True)
    counts: list[int] = field(kw_only=True)

    def narrows(self, layer: int) -> bool:
        return 0 < layer < len(self.counts) - 1

    compares = narrows

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        assert fresh is not None and stored is not None
        count = self.counts[layer + 1]
        if count >= len(rows):
            return rows
        attention = self.scores[torch.searchsorted(self.layout.reusable, rows)]
        error = deviation("v", fresh, stored).cpu()
        scores = attention**self.given.attention_power * error**self.given.error_power
        return highest(rows, scores, count)


def tapered(ratio: float, layers: int, taper: float) -> list[float]:
    """A share per layer, falling as (1 - l / (L - 1))^taper, none above 1, their mean ``ratio``."""
    left = [(1 - layer / max(1, layers - 1)) ** taper for layer in range(layers)]
    excess = [ratio * (weight / fmean(left) - 1) for weight in left]
    fits = min(1.0, (1 - ratio) / max(*excess, 1e-9))
    return [ratio + fits * more for more in excess]


#: Heading -> label -> mode. Rows under one heading have similar charged budgets, or show the effect
#: of a higher one.
GROUPS: dict[str, dict[str, str | Blender]] = {
    "ranked by": {
        "sensitivity (fused:attention=0)": "fused:attention=0",
        "half by sensitivity, half by attention too (fused)": Fused(0.12),
        "sensitivity * sqrt(question attention)": Sensitive(0.12, attention_power=0.5),
        "sensitivity * question attention": Sensitive(0.12, attention_power=1),
        "sqrt(attention * error), fewer in each layer": AttendedError(),
        "attention alone (prophet)": "prophet:recompute_ratio=0.12",
        "its norm, middle layers (infoflow)": "infoflow:recompute_ratio=0.13",
        "from anchors, middle layers (qcfuse)": "qcfuse:recompute_ratio=0.13",
        "error at layer 1 (cacheblend)": "cacheblend",
        "error at layer 1, gradual": "cacheblend:gradual=true",
        "attention received * error (kvshare)": "kvshare",
        "first tokens of each chunk (epic)": "epic:first_tokens=6",
        "nothing (random)": "random",
    },
    "preceding passage": {
        "people, a company, a town (fused)": "fused:attention=0",
        "its first sentence": Sensitive(passage="sentence"),
        "a text without people or places": Sensitive(passage="technical"),
        "three chunks of the same world": Sensitive(passage="world"),
        "150 random tokens": Sensitive(passage="random"),
    },
    "layers": {
        "middle third (fused)": "fused:attention=0",
        "first third": Sensitive(layers="first"),
        "last third": Sensitive(layers="last"),
        "all": Sensitive(layers="all"),
    },
    "share of tokens": {
        "3 %": "fused:attention=0,recompute_ratio=0.03",
        "5 %": "fused:attention=0,recompute_ratio=0.05",
        "8 %": "fused:attention=0,recompute_ratio=0.08",
        "10 %": "fused:attention=0,recompute_ratio=0.1",
        "15 % (fused)": "fused:attention=0",
        "20 %": "fused:attention=0,recompute_ratio=0.2",
        "30 %": "fused:attention=0,recompute_ratio=0.3",
    },
    "rows per layer, of 8 %": {
        "the same in all (fused)": "fused:attention=0,recompute_ratio=0.08",
        "falling to the half (gradual)": Sensitive(0.08, taper=0.5),
        "falling evenly to none": Sensitive(0.08, taper=1),
        "as a square": Sensitive(0.08, taper=2),
        "after one layer in full": "fused:attention=0,recompute_ratio=0.08+full_layers=1",
    },
    "probe of sqrt(attention * error)": {
        "15 % anchors": AttendedError(),
        "question alone": AttendedError(anchors=0),
        "30 % anchors": AttendedError(anchors=0.3),
        "everything": AttendedError(anchors=1),
        "15 % anchors, first third of the layers": AttendedError(layers="first"),
        "15 % anchors, middle third": AttendedError(layers="middle"),
        "15 % anchors, last third": AttendedError(layers="last"),
    },
    "powers of attention and error": {
        "1/2 and 1/2": AttendedError(),
        "1 and 0": AttendedError(attention_power=1, error_power=0),
        "0 and 1": AttendedError(attention_power=0, error_power=1),
        "1 and 1": AttendedError(attention_power=1, error_power=1),
        "1 and 1/2": AttendedError(attention_power=1),
        "1/2 and 1": AttendedError(error_power=1),
        "1/2 and 1/2, the same rows in all layers": AttendedError(taper=0),
    },
}
REFERENCES: dict[str, str | Blender] = {"full": "full", "reuse": "reuse"}
COMPILE = "prefix", "bos", "link0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=32)
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--group", action="append", choices=[*GROUPS, "encoding context"])
    parser.add_argument("--mode", action="append", default=[], help="measure these instead")
    given = parser.parse_args()
    groups = {name: rows for name, rows in GROUPS.items() if not given.group or name in given.group}
    if given.mode:
        groups = {"given": {mode: mode for mode in given.mode}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "choosing.jsonl"
        lines = prompt_lines(SEED, documents=8, contexts=given.contexts, quota=KINDS)
        path.write_text("".join(line + "\n" for line in lines))
        contexts = load_dataset(path)
    measure = partial(_measure, contexts, given.processes)
    if groups:
        found = measure(
            "prefix", [*REFERENCES.values(), *(m for g in groups.values() for m in g.values())]
        )
        for number, (name, rows) in enumerate(groups.items()):
            rows = rows if number else REFERENCES | rows
            print(table(name, {label: found[blender(mode)] for label, mode in rows.items()}))
    if not given.mode and (not given.group or "encoding context" in given.group):
        behind: dict[str, ModeSummary] = {}
        for how in COMPILE:
            found = measure(how, ["full", "reuse", "fused:attention=0"])
            behind |= {
                f"{how}: {mode}": found[blender(mode)] for mode in ("reuse", "fused:attention=0")
            }
        print(table("encoding context", behind))


def _measure(
    contexts: Sequence[EvalContext], processes: int, how: str, modes: Sequence[str | Blender]
) -> dict[Blender, ModeSummary]:
    chosen = {str(number): mode for number, mode in enumerate(dict.fromkeys(map(blender, modes)))}
    with render.progress(Console(stderr=True)) as told:
        asked = run_parallel(partial(_run, how, chosen), contexts, processes, partial(told, how))
    return {chosen[f.mode]: f for f in figures(by_mode(chosen, asked))}


def _run(
    how: str, chosen: Mapping[str, Blender], contexts: Sequence[EvalContext]
) -> Iterator[AskedQuestion]:
    engine = TransformersEngine.load(model_path(TINY))
    if any(isinstance(mode, Sensitive) for mode in chosen.values()):
        for name, before in passages(engine).items():
            CHANGES[name] = changes(engine, contexts, before)
    with tempfile.TemporaryDirectory() as folder, DiskStore(folder) as store:
        yield from ask_questions(engine, store, contexts, chosen, compile_mode=how, max_tokens=8)


TECHNICAL = (
    "A cache keeps what was computed once so that it need not be computed again. It is filled when "
    "a result is first needed, and a full cache makes room by dropping what was used least.",
    "Water boils at a lower temperature on a mountain, because the air presses on it less. That is "
    "why pasta takes longer to cook there.",
)


def passages(engine: Engine) -> dict[str, Tokens]:
    """What the chunks are encoded after, by name."""
    shipped = preceding_passage(engine)
    with world_file("documents.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    chunks = [chunk for text in texts for chunk in text.split("\n\n")]
    rng, vocabulary = random.Random(0), engine.tokenize("".join(map(chr, range(32, 127))))
    return {
        "shipped": shipped,
        "sentence": shipped[: 1 + shipped.index(engine.tokenize("a.")[-1])],
        "technical": joined(engine, TECHNICAL),
        "world": joined(engine, rng.sample(chunks, 3)),
        "random": tuple(rng.randrange(max(vocabulary), 2000) for _ in range(150)),
    }


def joined(engine: Engine, texts: Sequence[str]) -> Tokens:
    return tuple(token for text in texts for token in engine.template.chunk(text))


def changes(
    engine: Engine, contexts: Sequence[EvalContext], before: Tokens
) -> dict[Tokens, Tensor]:
    """See CHANGES."""
    found = {}
    prefix = engine.template.prefix
    for text in dict.fromkeys(chunk for context in contexts for chunk in context.chunks):
        chunk = engine.template.chunk(text)
        [alone], [moved] = (engine.encode([chunk], context=b) for b in (prefix, prefix + before))
        found[chunk] = torch.stack([*map(relative_change, alone.values, moved.values)])
    return found


def table(name: str, rows: Mapping[str, ModeSummary]) -> str:
    """In Markdown: exact match by kind with half its interval, KL to full, charged budget."""
    first = next(iter(rows.values()))
    kinds = [kind for kind in KINDS if kind in first.questions]
    heads = [name, *(f"{kind} ({first.questions[kind]})" for kind in kinds), "KL", "charged"]
    lines = [" | ".join(heads), "|".join(["---", *["--:"] * (len(kinds) + 2)])]
    for label, f in rows.items():
        right = (f.exact_match[kind] for kind in kinds)
        cells = [f"{100 * e.value:.1f} ±{100 * (e.half_width or 0):.1f}" for e in right]
        lines.append(" | ".join([label, *cells, f"{f.kl or 0:.3f}", f"{100 * f.charged:.1f} %"]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
