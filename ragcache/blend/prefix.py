"""Prefix caching: what serving engines do today."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Behind, Blender, FixedRows, Layout, Selector


@dataclass(frozen=True)
class Prefix(Blender):
    """Reuse chunks only while the prompt begins with exactly the tokens of an earlier one.

    A chunk's KV is taken when it was computed behind everything that stands before it here; from
    the first that was not, every row is computed. Exact, like the prefix caches of vLLM and
    SGLang, but in units of chunks.
    """

    name: ClassVar[str] = "prefix"

    @property
    def behind(self) -> Behind:
        return "context"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(layout.reusable[:0])
