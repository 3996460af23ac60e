"""EPIC: recompute the first tokens of every chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Blender, FixedRows, Layout, Selector, check_least


@dataclass(frozen=True)
class Epic(Blender):
    """Recompute the first ``first_tokens`` of every chunk, at all layers.

    LegoLink-k of Hu et al., ICML 2025, arXiv:2410.15332: the first tokens of a chunk computed
    alone are attention sinks, but are none inside a prompt. The paper uses 1 to 64. A chunk whose
    KV is exact where it stands, as a prompt's first one may be, is left as it is.
    """

    first_tokens: int = 16
    name: ClassVar[str] = "epic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self.first_tokens, "first_tokens")

    @property
    def keeps_rows(self) -> bool:
        return True

    def selector(self, layout: Layout, layers: int) -> Selector:
        chosen = (layout.place_in_chunk < self.first_tokens) & layout.moved
        return FixedRows(layout.reusable[chosen])
