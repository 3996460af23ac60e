"""Are the answers still those of full prefill? A share of them is asked once more to find out.

Nothing else tells: an answer from reused KV looks like any other, and how much must be recomputed
depends on the model and the questions. So a share of the answers is computed in full too, in the
background, as far as the first token. How often both have the same most likely first token
(agreement), and the KL divergence between the two, are figures for the operator.

Where agreement is below the floor, and that is no accident, the service recomputes more: the ratio
rises to the next of :data:`RATIOS` above what was used, and then to full prefill. A mode without a
ratio gives way to ``fused``, at the first of them. From there on it is also tried, in the
background, what the level below would answer; once that is at or above the floor, and that is no
accident either, the service goes back to it. So it does not go to and fro, and from full prefill it
does not return on the evidence of full prefill. "No accident": the whole of Wilson's score interval
(1927, 99 %) lies on that side of the floor, of at least ``least`` answers.

The monitor changes only what is left to the service. A mode or a ratio that a client names is used
as it is, and not counted: whoever asks for ``reuse`` wants to see what that does. Answers for which
nothing was loaded are not counted either, since those are exact.

What is known is known of all tenants together, and nothing of it names or quotes one. A tenant sees
in its reports that the ratio was raised, and no more. A restart begins at the settings.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import mean
from typing import TYPE_CHECKING, Any

from ragcache.blend import blender
from ragcache.eval.metrics import first_token_kl
from ragcache.settings import Settings
from ragcache.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.core.generate import GenerationStream
    from ragcache.core.request import Request
    from ragcache.rag import RagCache

logger = logging.getLogger(__name__)

RATIOS = 0.15, 0.3, 0.5
_Z = 2.576  # of the normal distribution, for 99 %
_TOKEN = Sampling(max_tokens=1)


@dataclass(frozen=True, slots=True)
class MonitorLevel:
    """How the service asks the questions that do not say it themselves."""

    name: str
    mode: str | None = None  # None: as the settings say
    ratio: float | None = None

    def applied(self, ask: Request) -> Request:
        return ask if self.mode is None else replace(ask, mode=self.mode, ratio=self.ratio)


@dataclass(slots=True)
class _Seen:
    """The last comparisons with full prefill, of one level."""

    window: int
    agreed: deque[bool] = field(init=False)
    kl: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.agreed, self.kl = deque(maxlen=self.window), deque(maxlen=self.window)

    def add(self, full: Tensor, other: Tensor) -> None:
        self.agreed.append(bool(full.argmax() == other.argmax()))
        self.kl.append(first_token_kl(full, other))

    def interval(self, least: int) -> tuple[float, float]:
        """The interval of the agreement; (0, 1) where fewer than ``least`` comparisons were
        seen."""
        few = len(self.agreed) < least
        return (0.0, 1.0) if few else wilson(sum(self.agreed), len(self.agreed))


class QualityMonitor:
    """Compares a ``share`` of a service's answers, and raises what it recomputes where agreement is
    below ``floor``. The last ``window`` comparisons count. Thread-safe; comparing is for the
    engine's thread.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        share: float = 0.01,
        floor: float = 0.95,
        window: int = 200,
        least: int = 20,
        seed: int | None = None,
    ) -> None:
        self.share, self.floor, self.window, self.least = share, floor, window, least
        self._mode = settings.mode
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._levels = [MonitorLevel("as set")]
        self._sampled = 0
        self._begin()

    @property
    def level(self) -> MonitorLevel:
        return self._levels[-1]

    def adjust(self, ask: Request) -> Request:
        """The question as it is to be asked now."""
        return self.level.applied(ask) if _left_to_us(ask) else ask

    def sentence(self, ask: Request) -> str | None:
        """For the report of the answer to ``ask``, where :meth:`adjust` has changed it."""
        if self.level.mode is None or not _left_to_us(ask):
            return None
        return f"answers fell short of full prefill's, so the service uses {self.level.name}"

    def sample(
        self, cache: RagCache, ask: Request, stream: GenerationStream
    ) -> Callable[[], None] | None:
        """What is to be done in the background about the answer to ``ask``, as it was adjusted and
        has been given; None where nothing is."""
        level, report = self.level, stream.answer.report
        exact = report.reused_tokens == 0 and len(self._levels) == 1
        if exact or not _same(ask, level) or self._random.random() >= self.share:
            return None
        chunks = [passage.chunk for passage in stream.answer.passages]
        given, logits = replace(ask, chunks=chunks), stream.first_logits
        ratio = float(report.parameters.get("recompute_ratio", 0.0))
        return lambda: self._compare(cache, given, level, logits, ratio)

    def status(self) -> dict[str, Any]:
        """For the operator: of the level in use since ``since`` (seconds since the epoch)."""
        with self._lock:
            here = self._here
            return {
                "level": len(self._levels) - 1,
                "name": self.level.name,
                "share": self.share,
                "floor": self.floor,
                "agreement": mean(here.agreed) if here.agreed else None,
                "kl": mean(here.kl) if here.kl else None,
                "window": len(here.agreed),
                "sampled": self._sampled,
                "since": self._since,
            }

    def _compare(
        self, cache: RagCache, ask: Request, level: MonitorLevel, logits: Tensor, ratio: float
    ) -> None:
        """Ask in full, and as the level below would, and draw the conclusions."""
        full = logits if level.mode == "full" else _first(cache, replace(ask, mode="full"))
        below = None
        if len(self._levels) > 1:
            plain = replace(ask, mode=None, ratio=None)
            below = _first(cache, self._levels[-2].applied(plain))
        with self._lock:
            if level is not self.level:
                return  # it has changed since the answer was given
            self._sampled += 1
            self._here.add(full, logits)
            self._ratios.append(ratio)
            if below is not None:
                self._below.add(full, below)
            if self._here.interval(self.least)[1] < self.floor:
                self._change([*self._levels, self._above(mean(self._ratios))], self._here)
            elif below is not None and self._below.interval(self.least)[0] >= self.floor:
                self._change(self._levels[:-1], self._below)

    def _above(self, ratio: float) -> MonitorLevel:
        """The next level up from one that used this ratio."""
        higher = next((r for r in RATIOS if r > ratio + 1e-9), None)
        if higher is None:
            return MonitorLevel("full prefill", "full")
        mode = self._mode if "recompute_ratio" in blender(self._mode).parameters else "fused"
        return MonitorLevel(f"mode {mode} at ratio {higher}", mode, higher)

    def _change(self, levels: list[MonitorLevel], seen: _Seen) -> None:
        rises = len(levels) > len(self._levels)
        logger.warning(
            "%d of %d answers had the first token of full prefill, the floor is %g: the service "
            "%s from %s to %s",
            *(sum(seen.agreed), len(seen.agreed), self.floor),
            *("rises" if rises else "goes back", self.level.name, levels[-1].name),
        )
        self._levels = levels
        self._begin()

    def _begin(self) -> None:
        self._here, self._below = _Seen(self.window), _Seen(self.window)
        self._ratios: deque[float] = deque(maxlen=self.window)
        self._since = time.time()


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The score interval of a share (Wilson, 1927), at 99 %."""
    share, z2 = successes / trials, _Z**2 / trials
    middle = share + z2 / 2
    half = _Z * sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def _left_to_us(ask: Request) -> bool:
    return ask.mode is None and ask.ratio in (None, "auto")


def _same(ask: Request, level: MonitorLevel) -> bool:
    """Whether it was asked as the level says."""
    if level.mode is None:
        return _left_to_us(ask)
    return (ask.mode, ask.ratio) == (level.mode, level.ratio)


def _first(cache: RagCache, ask: Request) -> Tensor:
    """Logits of the first token over the chunks that the answer was given from."""
    ratio = None if ask.mode == "full" else ask.ratio
    stream = cache.generate(replace(ask, ratio=ratio, sampling=_TOKEN, check=None, keep=False))
    for _ in stream:
        pass
    return stream.first_logits
