"""Full first layers for any method: ``random+full_layers=2``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ragcache.blend.base import (
    Blender,
    Layout,
    Positions,
    Probe,
    ReusedKV,
    Selector,
    check_least,
    check_number,
)
from ragcache.errors import ConfigError
from ragcache.types import KVPair

if TYPE_CHECKING:
    from ragcache.engine.base import AttentionRule, Repair
    from ragcache.types import ChunkNotes


@dataclass(frozen=True)
class WithFullLayers(Blender):
    """The method ``inner``, but the first ``layers`` layers compute every row.

    This gives a method the charged budget of one that needs its first layers in full, such as
    CacheBlend. ``selector`` raises ConfigError if the model has no layer after those.
    """

    inner: Blender
    layers: int
    name: ClassVar[str] = "full_layers"

    def __post_init__(self) -> None:
        check_number(self.layers, "full_layers", 1)
        check_least(self.layers, "full_layers", 1)

    @property
    def mode(self) -> str:
        return f"{self.inner.mode}+full_layers={self.layers}"

    @property
    def revision(self) -> int:
        return self.inner.revision

    @property
    def reuses(self) -> ReusedKV:
        return self.inner.reuses

    @property
    def by_sensitivity(self) -> bool:
        return self.inner.by_sensitivity

    @property
    def without_attention(self) -> Blender:
        return replace(self, inner=self.inner.without_attention)

    def overhead(
        self, notes: ChunkNotes, before: Sequence[bytes], exact: bool = False
    ) -> float | None:
        return self.inner.overhead(notes, before, exact)

    @property
    def placement(self) -> Positions:
        return self.inner.placement

    @property
    def ratio(self) -> float | None:
        return self.inner.ratio

    @property
    def full_layers(self) -> int:
        return max(self.layers, self.inner.full_layers)

    @property
    def parameters(self) -> dict[str, Any]:
        return self.inner.parameters | {"full_layers": self.layers}

    def selector(self, layout: Layout, layers: int) -> Selector:
        if self.layers >= layers:
            raise ConfigError(
                f"full_layers is {self.layers}, but the model has {layers} layers: use mode full"
            )
        return _AfterFullLayers(layout, self.inner.selector(layout, layers), self.layers)


@dataclass
class _AfterFullLayers(Selector):
    """Chooses every row below layer ``full_layers``, and from there on the rows of ``inner``."""

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

    @property
    def repair(self) -> Repair | None:
        return self.inner.repair

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
