"""Prefix caching, as in today's serving engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.base import Blender, FixedRows, Layout, ReusedKV, Selector


@dataclass(frozen=True)
class Prefix(Blender):
    """Reuse chunks only while the prompt begins with exactly the tokens of an earlier one.

    A chunk's KV is reused if it was computed after exactly the tokens that precede it here; from
    the first chunk without such KV on, every row is computed. Exact, like the prefix caches of vLLM
    and SGLang, but in units of chunks.
    """

    name: ClassVar[str] = "prefix"

    @property
    def reuses(self) -> ReusedKV:
        return "in_context"

    def selector(self, layout: Layout, layers: int) -> Selector:
        return FixedRows(layout.reusable[:0])
