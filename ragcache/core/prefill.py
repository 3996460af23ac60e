"""Prefill one request: look up its chunks, plan, and fuse; retry if a record cannot be read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ragcache.blend import Blender, with_ratio
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.core.consistent import MissingEncoder
from ragcache.core.explain import PartHistory, chunk_names, part_reports
from ragcache.core.kept_prompts import KeptPrompts, KeptRows
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Encoder, Prefiller
from ragcache.errors import StoreError
from ragcache.planning.context import EncodingContext
from ragcache.planning.controller import plan, prefill_cost
from ragcache.planning.cost_model import Speeds
from ragcache.planning.lookup import PromptLookup, look_up
from ragcache.store.base import ChunkStore, Miss, StoredChunk
from ragcache.store.key import ChunkKey
from ragcache.store.prefetch import LAYERS_AHEAD, LayerReader
from ragcache.types import Explanation, Plan

__all__ = ["LookupContext", "PrefillContext", "explain", "prefill", "usable"]


@dataclass(frozen=True, slots=True)
class LookupContext:
    """What prompts are looked up with: the engine, the store, and which keys its chunks have."""

    engine: Encoder
    store: ChunkStore
    encoding: EncodingContext
    tenant: str = ""
    history: PartHistory | None = None  # of the parts of prompts, for the reasons in reports

    def look_up(
        self,
        request: PromptRequest,
        kept: KeptRows | None = None,
        *,
        unusable: Collection[bytes] = (),
        count: bool = True,
    ) -> PromptLookup:
        """See :func:`ragcache.planning.lookup.look_up`."""
        return look_up(
            request.prompt,
            request.blender,
            self.store,
            self.engine.fingerprint,
            encoding=self.encoding,
            tenant=self.tenant,
            unusable=unusable,
            count=count,
            kept=0 if kept is None else kept.rows,
        )


@dataclass(frozen=True, slots=True)
class PrefillContext(LookupContext):
    """What all prefills share."""

    engine: Prefiller
    store_misses: bool = False  # copy the KV of missing chunks from the prompt, to be stored later
    chats: KeptPrompts | None = None  # KV of earlier turns

    def kept_rows(self, request: PromptRequest) -> KeptRows | None:
        """The first rows of the prompt that an earlier turn of the chat has computed."""
        if self.chats is None:
            return None
        return self.chats.find(request, self.encoding, self.tenant)


@dataclass(frozen=True, slots=True)
class FusedPrefill:
    """A prefilled prompt, with what was found, planned and changed for it."""

    fused: FusedPrompt
    found: PromptLookup
    blender: Blender  # with the ratio that was used
    plan: Plan | None  # None: the request had no speeds
    fallbacks: tuple[str, ...]  # messages for the report
    unreadable: tuple[ChunkKey, ...]  # of records that could not be read
    missed: Mapping[int, Miss]  # chunk number -> why its KV was computed before the prompt


def prefill(
    context: PrefillContext, request: PromptRequest, encoder: MissingEncoder | None = None
) -> FusedPrefill:
    """Prefill the prompt of ``request`` with the stored KV of its chunks.

    With an ``encoder``, what is missing is computed by it first and put into the context's store.
    Rows for ``request.sampling.max_tokens`` tokens are reserved. If a record cannot be read, the
    prefill starts again without it. Raises what ``request.check`` raises, ContextError for a
    prompt that is too long, and StoreError if the store fails.
    """
    failed: dict[bytes, ChunkKey] = {}
    fallbacks: list[str] = []
    missed: dict[int, Miss] = {}
    request = usable(request, context.engine)
    kept = context.kept_rows(request)
    while True:
        blender, chosen = request.blender, None
        encoded = set() if encoder is None else {key.digest for key in encoder.encoded}
        found = context.look_up(request, kept, unusable=failed.keys() - encoded)
        if encoder is not None and (new := encoder.encode(found, blender)):
            missed.update(found.misses)
            context.store.put_all(new)
            continue
        if request.speeds is not None and not found.layout.kept_chunk_rows:
            # Otherwise it is a chat, and the rest of it is short.
            chosen, found = _planned(context, found, request, request.speeds, failed)
            blender = with_ratio(blender, chosen.ratio)
        capture = context.store_misses and blender.reuses in ("in_context", "variant")
        try:
            with LayerReader(
                context.store,
                found.stored,
                ahead=LAYERS_AHEAD if chosen is None else chosen.ahead,
                upload=context.engine.upload,
            ) as source:
                fused = fuse(
                    context.engine,
                    blender,
                    found.layout,
                    source,
                    room=request.sampling.max_tokens,
                    check=request.check,
                    kept=None if kept is None else kept.prefilled,
                    capture=sorted(found.misses) if capture else (),
                    capture_texts=sorted(found.missing_texts) if context.store_misses else (),
                )
        except StoreError as error:
            if error.key is None or error.key in failed:
                raise
            what, failed[error.key] = found.name_of(error.key)
            fallbacks.append(f"{what} was recomputed: {error}")
        else:
            unreadable = tuple(failed.values())
            return FusedPrefill(fused, found, blender, chosen, tuple(fallbacks), unreadable, missed)


def explain(context: PrefillContext, request: PromptRequest) -> Explanation:
    """What :func:`prefill` would load for ``request`` now. Nothing is counted or computed."""
    request = usable(request, context.engine)
    kept = context.kept_rows(request)
    found = context.look_up(request, kept, count=False)
    blender, chosen = request.blender, None
    if request.speeds is not None and not found.layout.kept_chunk_rows:
        chosen, found = _planned(context, found, request, request.speeds, ())
        blender = with_ratio(blender, chosen.ratio)
    names = chunk_names(request.prompt, [passage.chunk.id for passage in request.passages])
    return Explanation(
        blender.mode,
        part_reports(found, names, context.history),
        request.passages,
        request.no_chunks,
        chosen,
    )


def usable(request: PromptRequest, engine: Prefiller) -> PromptRequest:
    """``request``, with the method that replaces its own where the engine does not show attention
    weights."""
    if engine.exposes_attention:
        return request
    return replace(request, blender=request.blender.without_attention)


def _planned(
    context: PrefillContext,
    found: PromptLookup,
    request: PromptRequest,
    speeds: Speeds,
    failed: Collection[bytes],
) -> tuple[Plan, PromptLookup]:
    """The plan, and ``found`` as it decides: without chunks that are cheaper to compute than to
    load, and with the records of the codecs that it chose for the others."""
    store, chunks = context.store, found.chunks
    levels: dict[int, list[StoredChunk]] = {}
    if far := [one for one in found.stored if one.is_remote]:
        probe = max(far, key=lambda one: one.payload_bytes)
        speeds = replace(speeds, link=store.link(probe))
        every = zip(chunks, store.alternatives(list(chunks.values())), strict=True)
        levels = {i: [f for f in fs if f.key.digest not in failed] for i, fs in every}
    cost = prefill_cost(
        found,
        request.blender,
        context.engine.spec.layers,
        levels,
        is_calibrated=request.is_calibrated,
    )
    chosen = plan(cost, speeds)
    better = {i: levels[i][level - 1] for i, level in chosen.levels.items()}
    return chosen, found.with_records(better).without(chosen.recompute)
