"""Compares a share of the answers with full prefill, and recomputes more if quality falls.

An answer from reused KV looks like any other, and how much must be recomputed depends on the model
and on the questions. So for a share of the answers the first token is also computed by full
prefill, in the background. How often both have the same most likely first token (agreement), and
the KL divergence of the two distributions, are reported to the operator.

If the agreement is below the floor, the service recomputes more: the ratio rises to the next of
:data:`RATIOS` above the one in use, and finally to full prefill. A mode without a ratio is replaced
by ``fused`` at the first of them. From then on the monitor also computes, in the background, what
the level below would answer; once the agreement of that is above the floor, the service returns to
it. So the level does not oscillate, and full prefill is not left on the evidence of full prefill.
Both are decided by a test that may look after every comparison
(:mod:`ragcache.eval.change_detector`).

The monitor adjusts only requests that leave mode and ratio to the service. A request that names a
mode or a ratio is answered with it and not counted for the level, since a client that asks for
``reuse`` wants its effect. Answers for which no KV was loaded are not counted either, since they
are exact. Answers that a store's calibration covers are compared as a whole too, see
:mod:`ragcache.api.promise_watch`.

The comparisons of all tenants are counted together, and the status names and quotes no tenant. A
tenant's reports only say that the ratio was raised. After a restart the service uses the settings
again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from ragcache.api.promise_watch import PromiseWatch, compared_tokens, is_promised
from ragcache.blend import blender
from ragcache.errors import StoreError
from ragcache.eval.change_detector import ChangeDetector
from ragcache.eval.metrics import first_token_kl
from ragcache.settings import Settings
from ragcache.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.core.generate import GenerationStream
    from ragcache.core.request import Request
    from ragcache.rag import RagCache
    from ragcache.types import Answer

logger = logging.getLogger(__name__)

RATIOS = 0.15, 0.3, 0.5
_ONE_TOKEN = Sampling(max_tokens=1)


@dataclass(frozen=True, slots=True)
class MonitorLevel:
    """Mode and ratio of requests that leave them to the service."""

    name: str
    mode: str | None = None  # None: that of the settings
    ratio: float | None = None

    def applied(self, request: Request) -> Request:
        return request if self.mode is None else replace(request, mode=self.mode, ratio=self.ratio)


@dataclass(slots=True)
class _Comparisons:
    """Comparisons of one level with full prefill: the last ``window`` of them, and a detector for
    one of the two outcomes."""

    window: int
    detector: ChangeDetector
    agreed: deque[bool] = field(init=False)
    kl: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.agreed, self.kl = deque(maxlen=self.window), deque(maxlen=self.window)

    def add(self, full: Tensor, other: Tensor, looked_for: bool) -> bool:
        """Count a comparison. Returns whether agreement, or disagreement, as ``looked_for`` says,
        comes more often than the detector allows."""
        agrees = bool(full.argmax() == other.argmax())
        self.agreed.append(agrees)
        self.kl.append(first_token_kl(full, other))
        return self.detector.add(agrees == looked_for)


class QualityMonitor:
    """Compares a ``share`` of a service's answers with full prefill, and has the service recompute
    more if their agreement is below ``floor``. The status is about the last ``window`` comparisons.

    Thread-safe; the comparisons run on the engine's thread.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        share: float = 0.01,
        floor: float = 0.95,
        window: int = 200,
        seed: int | None = None,
    ) -> None:
        self.share, self.floor, self.window = share, floor, window
        self.promises = PromiseWatch()
        self._mode = settings.mode
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._levels = [MonitorLevel("as set")]
        self._sampled = 0
        self._begin()

    @property
    def level(self) -> MonitorLevel:
        return self._levels[-1]

    def adjust(self, request: Request) -> Request:
        """The request with the current level's mode and ratio, if it leaves them to the
        service."""
        return self.level.applied(request) if _is_default(request) else request

    def note(self, request: Request) -> str | None:
        """A sentence for the answer's report if :meth:`adjust` changes ``request``."""
        if self.level.mode is None or not _is_default(request):
            return None
        return f"answers fell short of full prefill's, so the service uses {self.level.name}"

    def sample(
        self, cache: RagCache, request: Request, stream: GenerationStream
    ) -> Callable[[], None] | None:
        """The comparison of a finished answer, to be run in the background; None if the answer is
        not compared. ``request`` is the adjusted one."""
        level, answer = self.level, stream.answer
        report, certificate = answer.report, answer.report.certificate
        exact = report.reused_tokens == 0 and len(self._levels) == 1
        counts = _uses_level(request, level) and not exact
        promised = certificate if is_promised(report) else None
        if not (counts or promised) or self._random.random() >= self.share:
            return None
        if promised is not None and promised.escalated:  # it is full prefill's answer
            return lambda: self.promises.add(cache, promised, disagreed=False)
        chunks = [passage.chunk for passage in answer.passages]
        same, logits = request.with_chunks(chunks), stream.first_logits
        ratio = float(report.parameters.get("recompute_ratio", 0.0))

        def compare() -> None:
            full = logits
            if promised is not None:
                sampling = request.sampling or cache.default_sampling
                most = compared_tokens(promised, sampling)
                full, found = _by_full_prefill(cache, same, replace(sampling, max_tokens=most))
                try:
                    self.promises.compare(cache, promised, answer, found)
                except StoreError as error:  # the next answer tries again
                    logger.warning("a promise that is not kept cannot be withdrawn: %s", error)
            elif level.mode != "full":
                full, _ = _by_full_prefill(cache, same)
            if counts:
                self._compare(cache, same, level, full, logits, ratio)

        return compare

    def status(self) -> dict[str, Any]:
        """The current level and its comparisons since ``since`` (seconds since the epoch)."""
        with self._lock:
            current = self._current
            return {
                "level": len(self._levels) - 1,
                "name": self.level.name,
                "share": self.share,
                "floor": self.floor,
                "agreement": mean(current.agreed) if current.agreed else None,
                "kl": mean(current.kl) if current.kl else None,
                "window": len(current.agreed),
                "sampled": self._sampled,
                "since": self._since,
                **self.promises.status(),
            }

    def _compare(
        self,
        cache: RagCache,
        request: Request,
        level: MonitorLevel,
        full: Tensor,
        logits: Tensor,
        ratio: float,
    ) -> None:
        """Compute the first token at the level below, count it and the answer's, and change the
        level if that is due. ``full``, ``logits``: of the first token, by full prefill and as it
        was answered."""
        below = None
        if len(self._levels) > 1:
            plain = replace(request, mode=None, ratio=None)
            below = _first_logits(cache, self._levels[-2].applied(plain))
        with self._lock:
            if level is not self.level:
                return  # it has changed since the answer was given
            self._sampled += 1
            self._ratios.append(ratio)
            falls_short = self._current.add(full, logits, looked_for=False)
            suffices = below is not None and self._below.add(full, below, looked_for=True)
            if falls_short:
                self._change([*self._levels, self._above(mean(self._ratios))], self._current)
            elif suffices:
                self._change(self._levels[:-1], self._below)

    def _above(self, ratio: float) -> MonitorLevel:
        """The level above one that used this ratio."""
        higher = next((r for r in RATIOS if r > ratio + 1e-9), None)
        if higher is None:
            return MonitorLevel("full prefill", "full")
        mode = self._mode if blender(self._mode).ratio is not None else "fused"
        return MonitorLevel(f"mode {mode} at ratio {higher}", mode, higher)

    def _change(self, levels: list[MonitorLevel], comparisons: _Comparisons) -> None:
        rises = len(levels) > len(self._levels)
        logger.warning(
            "%d of %d answers had the first token of full prefill, the floor is %g: the quality "
            "monitor %s the level from %s to %s",
            *(sum(comparisons.agreed), len(comparisons.agreed), self.floor),
            *("raises" if rises else "lowers", self.level.name, levels[-1].name),
        )
        self._levels = levels
        self._begin()

    def _begin(self) -> None:
        self._current = _Comparisons(self.window, ChangeDetector(1 - self.floor))
        self._below = _Comparisons(self.window, ChangeDetector(self.floor))
        self._ratios: deque[float] = deque(maxlen=self.window)
        self._since = time.time()


def _is_default(request: Request) -> bool:
    """Whether the request leaves mode and ratio to the service."""
    return request.mode is None and request.ratio in (None, "auto")


def _uses_level(request: Request, level: MonitorLevel) -> bool:
    if level.mode is None:
        return _is_default(request)
    return (request.mode, request.ratio) == (level.mode, level.ratio)


def _first_logits(cache: RagCache, request: Request) -> Tensor:
    return _answered(cache, request, _ONE_TOKEN)[0]


def _by_full_prefill(
    cache: RagCache, request: Request, sampling: Sampling = _ONE_TOKEN
) -> tuple[Tensor, Answer]:
    """Logits of the first token, (vocabulary,), and the answer."""
    return _answered(cache, replace(request, mode="full", ratio=None), sampling)


def _answered(cache: RagCache, request: Request, sampling: Sampling) -> tuple[Tensor, Answer]:
    """The same for any mode."""
    plain = replace(request, sampling=sampling, check=None, keep=False)
    stream = cache.generate(plain)
    for _ in stream:
        pass
    return stream.first_logits, stream.answer
