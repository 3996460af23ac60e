"""What is computed from the systems' answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from bench.peers.protocol import Answered, Loaded, Mode


@dataclass(frozen=True)
class Record:
    """One prompt in one mode."""

    prompt: int
    mode: str
    tokens: list[int]
    ttft_s: float
    computed: float | None
    again_s: float | None  # TTFT of the same chunks with another question; None in mode full


@dataclass(frozen=True)
class Measured:
    """A system and all its answers. One that cannot be run has ``error`` and nothing else."""

    system: str
    loaded: Loaded | None
    records: list[Record]
    load_s: float = 0.0  # to load the model and fill the caches
    peak_mib: int = 0
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A mode of a system: medians and means over prompts."""

    system: str
    mode: Mode
    ttft_s: float
    own_ratio: float  # its own full prefill's TTFT over its TTFT; median over prompts
    best_ratio: float  # the same with the lowest median TTFT of any system's full prefill
    again_s: float | None
    computed: float | None
    first_same: float  # share of prompts with the first token of its own full prefill
    tokens_same: float  # share of positions with the same token
    f1: float  # of the texts' words


def rows(measured: Sequence[Measured], decode: Callable[[list[int]], str]) -> list[Row]:
    """One per mode of every system that ran, in their order."""
    fulls = [
        median(r.ttft_s for r in one.records if r.mode == mode.name)
        for one in measured
        for mode in modes(one)
        if mode.name == mode.full and mode.prompt == Mode.prompt
    ]
    return [_row(one, mode, min(fulls), decode) for one in measured for mode in modes(one)]


def modes(one: Measured) -> list[Mode]:
    """Those that have answers."""
    answered = {record.mode for record in one.records}
    return [mode for mode in one.loaded.modes if mode.name in answered] if one.loaded else []


def _row(one: Measured, mode: Mode, fastest: float, decode: Callable[[list[int]], str]) -> Row:
    mine = [r for r in one.records if r.mode == mode.name]
    full = {r.prompt: r for r in one.records if r.mode == mode.full}
    pairs = [(r, full[r.prompt]) for r in mine]
    again = [r.again_s for r in mine if r.again_s is not None]
    computed = [r.computed for r in mine if r.computed is not None]
    ttft = median(r.ttft_s for r in mine)
    return Row(
        one.system,
        mode,
        ttft,
        own_ratio=median(f.ttft_s / r.ttft_s for r, f in pairs),
        best_ratio=fastest / ttft,
        again_s=median(again) if again else None,
        computed=median(computed) if computed else None,
        first_same=fmean(r.tokens[:1] == f.tokens[:1] for r, f in pairs),
        tokens_same=fmean(same_share(r.tokens, f.tokens) for r, f in pairs),
        f1=fmean(word_f1(decode(r.tokens), decode(f.tokens)) for r, f in pairs),
    )


def same_share(got: Sequence[int], want: Sequence[int]) -> float:
    """Share of positions with the same token, of those of the longer answer."""
    longest = max(len(got), len(want))
    return sum(a == b for a, b in zip(got, want, strict=False)) / longest if longest else 1.0


def word_f1(got: str, want: str) -> float:
    """F1 over words in lower case, in [0, 1]."""
    mine, theirs = Counter(got.lower().split()), Counter(want.lower().split())
    words = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / words if words else 1.0


def without_end(answered: Answered, end: set[int]) -> list[int]:
    """The answer's tokens before the first one that ends it: some systems return that one too."""
    for at, token in enumerate(answered.tokens):
        if token in end:
            return answered.tokens[:at]
    return answered.tokens
