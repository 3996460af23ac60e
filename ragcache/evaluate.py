"""Answers and cost of every mode over the same prompts, chunks given, one table."""

from __future__ import annotations

import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from ragcache.answer import Answering
from ragcache.blend import BLENDERS, Blender, blender
from ragcache.dataset import Context, Question
from ragcache.engine.base import Engine
from ragcache.errors import ConfigError
from ragcache.models import TINY, model_path
from ragcache.precompute import precompute
from ragcache.settings import Settings
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey
from ragcache.types import Answer, Sampling

#: What is compared unless modes are named. The control pays for full layers as CacheBlend does.
MODES = {
    "full": "full",
    "prefix": "prefix",
    "reuse": "reuse",
    "overlapping": "reuse:positions=overlapping",
    "random": "random:full_layers=2",
    "cacheblend": "cacheblend",
}


def modes(names: Sequence[str] | None = None, ratio: float | None = None) -> dict[str, Blender]:
    """Blenders by label, :data:`MODES` by default; ``ratio`` goes to those that take one.

    Raises ConfigError for an unknown mode, or where there is a ratio and no mode takes one.
    """
    made: dict[str, Blender] = {}
    taken = False
    for label, name in MODES.items() if not names else ((name, name) for name in names):
        cls = BLENDERS.get(name.partition(":")[0])
        takes = cls is not None and "recompute_ratio" in cls.__dataclass_fields__
        taken |= takes
        made[label] = blender(name, ratio if takes else None)
    if ratio is not None and not taken:
        raise ConfigError(f"none of the modes {', '.join(made)} takes a ratio: leave it out")
    return made


@dataclass
class Scores:
    """What one mode did over all questions."""

    mode: str
    right: Counter[str] = field(default_factory=Counter)  # kind -> exact matches
    asked: Counter[str] = field(default_factory=Counter)
    f1: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    ttft_ratio: list[float] = field(default_factory=list)  # full / this, question by question
    recomputed: list[float] = field(default_factory=list)  # at the last layer: the nominal ratio
    charged: list[float] = field(default_factory=list)
    bytes_loaded: list[int] = field(default_factory=list)

    def accuracy(self, kind: str) -> float:
        """Share of exact matches; NaN where none was asked."""
        return self.right[kind] / self.asked[kind] if self.asked[kind] else float("nan")

    def summary(self) -> dict[str, Any]:
        """Everything in numbers, for JSON. Times are medians, the rest means."""
        return {
            "mode": self.mode,
            "questions": dict(self.asked),
            "exact_match": {kind: self.accuracy(kind) for kind in self.asked},
            "f1": mean(self.f1),
            "ttft_ms": 1e3 * median(self.ttft_s),
            "ttft_speedup": median(self.ttft_ratio) if self.ttft_ratio else None,
            "recomputed": mean(self.recomputed),
            "charged_budget": mean(self.charged),
            "bytes_loaded": mean(self.bytes_loaded),
        }


def evaluate(
    engine: Engine,
    store: ChunkStore,
    contexts: Sequence[Context],
    modes: dict[str, Blender],
    *,
    max_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scores]:
    """Ask every question in every mode, over chunks that were precomputed one by one.

    ``store`` should be empty: each context's chunks are put before its questions and deleted
    after them, so that nothing is shared between contexts. Modes take turns at each question,
    starting with another one each time; ratios of times are taken question by question.
    """
    scores = {label: Scores(label) for label in modes}
    sampling = Sampling(max_tokens=max_tokens)
    answering = Answering(engine, store, store_misses=False)
    total, done = sum(len(c.questions) for c in contexts), 0
    for context in contexts:
        keys = _keys(engine, context)
        precompute(engine, store, keys)
        for question in context.questions:
            prompt = engine.template.prompt(context.chunks, question.text)
            answers = {}
            for label in _turned(list(modes), done):
                stream = answering.stream(prompt, modes[label], sampling)
                answers[label] = stream.answer
            _count(scores, question, answers, modes)
            done += 1
            if progress is not None:
                progress(done, total)
        for key in keys:
            store.delete(key)
    return list(scores.values())


def compare(
    settings: Settings,
    contexts: Sequence[Context],
    chosen: dict[str, Blender],
    *,
    max_tokens: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Scores]:
    """:func:`evaluate` the model of ``settings`` over an LMDB store on disk, gone afterwards."""
    from ragcache.engine.transformers import TransformersEngine
    from ragcache.store.lmdb import LmdbStore

    engine = TransformersEngine.load(
        model_path(settings.model or TINY), device=settings.device, dtype=settings.dtype
    )
    told = progress or (lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder, LmdbStore(folder) as store:
        return evaluate(
            engine,
            store,
            contexts,
            chosen,
            max_tokens=max_tokens,
            progress=lambda done, total: told("questions", done, total),
        )


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's, as CacheBlend uses it)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(text: str, answers: Iterable[str]) -> bool:
    return normalise(text) in {normalise(a) for a in answers}


def f1(text: str, answers: Iterable[str]) -> float:
    """Best word F1 over the answers, in [0, 1]."""
    return max((_f1(normalise(text).split(), normalise(a).split()) for a in answers), default=0.0)


def _f1(got: list[str], want: list[str]) -> float:
    common = sum((Counter(got) & Counter(want)).values())
    if not common:
        return float(got == want)
    return 2 * common / (len(got) + len(want))


def _keys(engine: Engine, context: Context) -> list[ChunkKey]:
    template = engine.template
    chunks = (template.chunk(chunk) for chunk in context.chunks)
    return [
        ChunkKey(engine.fingerprint, template.prefix),
        *(ChunkKey(engine.fingerprint, chunk, template.prefix) for chunk in chunks),
    ]


def _turned(labels: list[str], by: int) -> Iterator[str]:
    by %= len(labels)
    yield from labels[by:] + labels[:by]


def _count(
    scores: dict[str, Scores],
    question: Question,
    answers: dict[str, Answer],
    modes: dict[str, Blender],
) -> None:
    full = next((a.report.ttft_s for k, a in answers.items() if modes[k].name == "full"), None)
    for label, answer in answers.items():
        s, report = scores[label], answer.report
        s.asked[question.kind] += 1
        s.right[question.kind] += exact_match(answer.text, question.answers)
        s.f1.append(f1(answer.text, question.answers))
        s.ttft_s.append(report.ttft_s)
        if full is not None:
            s.ttft_ratio.append(full / report.ttft_s)
        s.recomputed.append(report.recomputed_share)
        s.charged.append(report.charged_share)
        s.bytes_loaded.append(report.bytes_loaded)
