"""The prefill of one request: resolve, fuse, and begin again without what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ragcache.blend import Blender, with_ratio
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.engine.base import Prefilled, Prefiller
from ragcache.errors import StoreError
from ragcache.planning.context import EncodingContext
from ragcache.planning.controller import plan, prefill_cost
from ragcache.planning.cost_model import Speeds
from ragcache.planning.lookup import PromptLookup, look_up
from ragcache.store.base import ChunkStore, StoredChunk
from ragcache.store.key import ChunkKey
from ragcache.store.prefetch import AHEAD, LayerReader
from ragcache.types import Plan, Prompt


@dataclass(frozen=True, slots=True)
class PrefillContext:
    """What it takes to fuse: a model, its chunks' KV, and whose they are."""

    engine: Prefiller
    store: ChunkStore
    encoding: EncodingContext
    tenant: str = ""
    store_misses: bool = False  # capture the KV of chunks that come to stand in the prompt


class FusedPrefill:
    """The prefill of one prompt, with what went otherwise than asked."""

    def __init__(
        self,
        given: PrefillContext,
        prompt: Prompt,
        blender: Blender,
        *,
        room: int = 1,
        speeds: Speeds | None = None,
        check: Callable[[], None] | None = None,
        fallbacks: Sequence[str] = (),
    ) -> None:
        self.given, self.blender, self.room, self.speeds = given, blender, room, speeds
        self.check = check
        self.floor = blender  # of the ratio
        self.plan: Plan | None = None
        self.fallbacks = list(fallbacks)
        self.rotten: list[ChunkKey] = []  # records that failed while they were read
        self.resolved, self.fused = self._run(prompt)

    @property
    def prefilled(self) -> Prefilled:
        return self.fused.prefilled

    def _run(self, prompt: Prompt) -> tuple[PromptLookup, FusedPrompt]:
        """Fuse; a record that fails while it is read is dropped, and the fusion begins again."""
        given, unusable = self.given, set[bytes]()
        while True:
            resolved = look_up(
                prompt,
                self.blender,
                given.store,
                given.engine.fingerprint,
                encoding=given.encoding,
                tenant=given.tenant,
                unusable=unusable,
            )
            if self.speeds is not None:
                resolved = self._planned(resolved, self.speeds, unusable)
            try:
                return resolved, self._fuse(resolved)
            except StoreError as error:
                if error.key is None or error.key in unusable:
                    raise
                unusable.add(error.key)
                number = resolved.number_of(error.key)
                self.rotten.append(resolved.prefix_key if number is None else resolved.keys[number])
                what = "the prefix" if number is None else f"chunk {number + 1}"
                self.fallbacks.append(f"{what} was recomputed: {error}")

    def _planned(
        self, resolved: PromptLookup, speeds: Speeds, unusable: Collection[bytes]
    ) -> PromptLookup:
        """Choose the ratio, what is not loaded though it is stored, and levels for the rest."""
        store, chunks = self.given.store, resolved.chunks
        levels: dict[int, list[StoredChunk]] = {}
        if far := [one for one in resolved.stored if one.distant]:
            probe = max(far, key=lambda one: one.payload_bytes)
            speeds = replace(speeds, link=store.link(probe))
            every = zip(chunks, store.forms(list(chunks.values())), strict=True)
            levels = {i: [f for f in fs if f.key.digest not in unusable] for i, fs in every}
        wanted = prefill_cost(resolved, self.floor, self.given.engine.spec.layers, levels)
        self.plan = plan(wanted, speeds)
        self.blender = with_ratio(self.floor, self.plan.ratio)
        better = {i: levels[i][level - 1] for i, level in self.plan.levels.items()}
        return resolved.with_records(better).without(self.plan.recompute)

    def _fuse(self, resolved: PromptLookup) -> FusedPrompt:
        in_place = self.blender.reuses in ("in_context", "variant")
        capture = sorted(resolved.misses) if in_place else []
        engine = self.given.engine
        ahead = AHEAD if self.plan is None else self.plan.ahead
        with LayerReader(
            self.given.store, resolved.stored, ahead=ahead, upload=engine.upload
        ) as source:
            return fuse(
                engine,
                self.blender,
                resolved.layout,
                source,
                room=self.room,
                check=self.check,
                capture=capture if self.given.store_misses else (),
            )
