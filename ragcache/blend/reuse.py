"""Naive reuse: the fastest method, and the lower bound for quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from ragcache.blend.base import Blender, FixedRows, Layout, Positions, Selector
from ragcache.errors import ConfigError

__all__ = ["Reuse"]


@dataclass(frozen=True)
class Reuse(Blender):
    """Place every chunk's stored KV and compute only the question.

    ``positions``: ``consecutive`` places chunks one after another; ``overlapping``
    starts every chunk right after the prefix (parallel encoding: APE with T = S = 1, Yang et
    al., ICLR 2025, arXiv:2502.05431).
    """

    positions: Positions = "consecutive"
    name: ClassVar[str] = "reuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in get_args(Positions):
            known = " or ".join(get_args(Positions))
            raise ConfigError(f"positions is {self.positions!r}: it must be {known}")

    @property
    def placement(self) -> Positions:
        return self.positions

    @property
    def keeps_rows(self) -> bool:
        return self.positions == "consecutive"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(layout.reusable[:0])
