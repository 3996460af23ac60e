"""Full prefill: the reference for quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Blender, FixedRows, Layout, ReusedKV, Selector

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Blender):
    """Compute every row of the prompt; load nothing."""

    name: ClassVar[str] = "full"

    @property
    def reuses(self) -> ReusedKV:
        return "nothing"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(layout.reusable)
