"""Prefix caching: what serving engines do today."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Blender, FixedRows, Layout, ReusedKV, Selector


@dataclass(frozen=True)
class Prefix(Blender):
    """Reuse chunks only while the prompt begins with exactly the tokens of an earlier one.

    A chunk's KV is taken when it was computed behind everything that stands before it here; from
    the first that was not, every row is computed. Exact, like the prefix caches of vLLM and
    SGLang, but in units of chunks.
    """

    name: ClassVar[str] = "prefix"

    @property
    def reuses(self) -> ReusedKV:
        return "in_context"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(layout.reusable[:0])
