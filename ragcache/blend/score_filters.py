"""Windows, floors and full first layers for any method that ranks rows: ``prophet+windows=8``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import Behind, Blender, Layout, Positions, Probe, Selector, check_number
from ragcache.blend.ranking import Ranking, ScoreFilter
from ragcache.errors import ConfigError
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionRule
    from ragcache.types import ChunkNotes


@dataclass(frozen=True)
class Windows:
    """Average scores over ``size`` neighbours in the chunk, so that whole passages are chosen.

    After CacheClip's grouping (arXiv:2510.10129), which keeps windows of 8 with many hits.
    """

    size: int = 8
    name: ClassVar[str] = "windows"

    def __call__(self, scores: Tensor, rows: Tensor, chunk: Tensor, place: Tensor) -> Tensor:
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), scores.double().cumsum(0)])
        at = torch.arange(len(scores))
        low = torch.maximum(at - (self.size - 1) // 2, torch.searchsorted(chunk, chunk))
        high = torch.minimum(at + self.size // 2 + 1, torch.searchsorted(chunk, chunk, right=True))
        return (sums[high] - sums[low]) / (high - low)


@dataclass(frozen=True)
class Successors:
    """Let each of the ``size`` rows behind a row share its score: a value's binding stands there
    too."""

    size: int = 1
    name: ClassVar[str] = "successors"

    def __call__(self, scores: Tensor, rows: Tensor, chunk: Tensor, place: Tensor) -> Tensor:
        if not len(rows):
            return scores
        at = rows - rows[0]
        dense = torch.full((int(at[-1]) + 1,), float("-inf"), dtype=scores.dtype)
        dense[at] = shared = scores
        for distance in range(1, min(self.size, int(place.max())) + 1):
            behind = (place >= distance) & (at >= distance)
            passed = torch.where(behind, dense[(at - distance).clamp_min(0)], float("-inf"))
            shared = torch.maximum(shared, passed)
        return shared


@dataclass(frozen=True)
class First:
    """Put the first ``size`` rows of every chunk ahead of all others, inside the budget."""

    size: int = 4
    name: ClassVar[str] = "first"

    def __call__(self, scores: Tensor, rows: Tensor, chunk: Tensor, place: Tensor) -> Tensor:
        if not len(scores):
            return scores
        leads = place < self.size
        step = 1 + scores.abs().max()  # a step that is not lost beside any score
        return torch.where(leads, scores.max() + step * (1 + place.max() - place), scores)


SHAPES: dict[str, type[Windows] | type[Successors] | type[First]] = {
    cls.name: cls for cls in (Windows, Successors, First)
}


@dataclass(frozen=True)
class Shaped(Blender):
    """A method with the scores of its rows reshaped, or its first layers computed in full.

    Raises ConfigError, before any work, where the method ranks no rows.
    """

    inner: Blender
    shapes: tuple[ScoreFilter, ...] = ()
    full_layers: int = 0
    name: ClassVar[str] = "shaped"

    def __post_init__(self) -> None:
        for what, size in self._sizes().items():
            check_number(size, what, 1)
            if size < 1:
                raise ConfigError(f"{what}={size}: give 1 or more")

    @property
    def mode(self) -> str:
        return self.inner.mode + "".join(f"+{name}={n}" for name, n in self._sizes().items())

    @property
    def behind(self) -> Behind:
        return self.inner.behind

    @property
    def by_sensitivity(self) -> bool:
        return self.inner.by_sensitivity

    def overhead(self, notes: ChunkNotes, before: Sequence[bytes]) -> float | None:
        return self.inner.overhead(notes, before)

    @property
    def placement(self) -> Positions:
        return self.inner.placement

    @property
    def parameters(self) -> dict[str, Any]:
        return self.inner.parameters | self._sizes()

    def selector(self, layout: Layout, layers: int) -> Selector:
        selector = self.inner.selector(layout, layers)
        if self.shapes:
            if not isinstance(selector, Ranking):
                raise ConfigError(
                    f"mode {self.inner.name} ranks no rows, so {self.shapes[0].name} cannot be "
                    "used with it"
                )
            selector.shapes += self.shapes
        if self.full_layers >= layers:
            raise ConfigError(
                f"full_layers is {self.full_layers}, but the model has {layers} layers: use mode "
                "full"
            )
        return (
            _AfterFullLayers(layout, selector, self.full_layers) if self.full_layers else selector
        )

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {s.name: s.size for s in self.shapes}  # type: ignore[attr-defined]
        return sizes | ({"full_layers": self.full_layers} if self.full_layers else {})


@dataclass
class _AfterFullLayers(Selector):
    """Every row below layer ``full_layers``, then what ``inner`` has come to by then."""

    layout: Layout
    inner: Selector
    full_layers: int
    _rows: Tensor = field(init=False)  # inner's own

    @property
    def probe(self) -> Probe | None:
        return self.inner.probe

    @property
    def attend(self) -> AttentionRule | None:
        return self.inner.attend

    @property
    def lasting(self) -> bool:
        return self.inner.lasting

    def first(self) -> Tensor:
        self._rows = self.inner.first()
        return self.layout.reusable

    def loads(self, layer: int) -> bool:
        if self.inner.probe is not None or layer >= self.full_layers:
            return True
        return any(self.inner.compares(below) for below in range(layer + 1))

    def narrows(self, layer: int) -> bool:
        return layer == self.full_layers - 1 or self.inner.narrows(layer)

    def compares(self, layer: int) -> bool:
        return self.inner.compares(layer)

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        if self.inner.narrows(layer):
            at = torch.searchsorted(rows, self._rows)
            own = [_of_rows(pair, at) for pair in (fresh, stored)]
            self._rows = self.inner.narrow(layer, self._rows, *own)
        return self._rows if layer >= self.full_layers - 1 else rows


def _of_rows(pair: KVPair | None, at: Tensor) -> KVPair | None:
    if pair is None:
        return None
    keys, values = pair
    at = at.to(keys.device)
    return keys.index_select(1, at), values.index_select(1, at)
