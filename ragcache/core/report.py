"""Build the report of a prefill: what was reused of every chunk, and what was computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from ragcache.blend.fuse import FusedPrompt
from ragcache.core.explain import PartHistory, chunk_names, part_reports
from ragcache.core.prefill import FusedPrefill
from ragcache.planning.lookup import PromptLookup
from ragcache.store.base import Miss
from ragcache.types import ChunkReport, Passage, Report

__all__ = ["make_report"]

_ESCALATED = "loaded, and then computed all the same: the answer was escalated to full prefill"


def make_report(
    done: FusedPrefill, passages: Sequence[Passage] = (), history: PartHistory | None = None
) -> Report:
    """A Report without a certificate, whose times are 0. Chunks have the ids of their passages, or
    else numbers from 1. The prompt's parts are added to ``history``, which explains why parts were
    not stored."""
    fused, found, blender = done.fused, done.found, done.blender
    misses = {**done.missed, **found.misses}
    layout, prompt = fused.layout, fused.layout.prompt
    names = chunk_names(prompt, [passage.chunk.id for passage in passages])
    parts = part_reports(found, names, history, done.missed)
    if history is not None:
        history.remember(found, names, done.missed)
    layers = _rows_by_chunk(fused)
    partial = [rows for rows in layers if sum(rows) < len(layout.reusable)] or layers
    before = sum(len(prompt.chunks[number]) for number in done.missed)
    recomputed = round(
        fmean(sum(n for i, n in enumerate(rows) if i not in done.missed) for rows in partial)
    )
    return Report(
        mode=blender.mode,
        parameters=blender.parameters,
        prefix_tokens=len(prompt.prefix),
        chunk_tokens=sum(map(len, prompt.chunks)),
        question_tokens=len(prompt) - len(prompt.prefix) - sum(map(len, prompt.chunks)),
        reused_tokens=len(layout.reusable) + layout.kept_chunk_rows - before - recomputed,
        recomputed_tokens=recomputed + layout.after_kept_rows,
        charged_budget=fused.charged_budget,
        bytes_loaded=sum(layer.load_bytes for layer in fused.layers),
        ttft_s=0.0,
        total_s=0.0,
        chunks=tuple(
            _chunk(
                found, misses, i, name, [rows[i] for rows in layers], [rows[i] for rows in partial]
            )
            for i, name in enumerate(names[: len(prompt.chunks)])
        ),
        parts=parts,
        layers=fused.layers,
        loaded_text_tokens=len(layout.loaded_text_rows) + layout.kept - layout.kept_chunk_rows,
        kept_tokens=layout.kept,
        probe_rows=fused.again,
        late_tokens=_late(fused, done.missed),
        late_s=fused.repair_s,
        fallbacks=(*done.fallbacks, *_fallbacks(done)),
        plan=done.plan,
        computed=tuple(_computed(fused).tolist()),
    )


def _computed(fused: FusedPrompt) -> Tensor:
    """Per row of the prompt, at how many layers it was computed."""
    return fused.computed.index_fill(0, fused.late, len(fused.chosen))


def _late(fused: FusedPrompt, missed: Collection[int]) -> int:
    """The number of late rows of chunks that were stored before this prompt."""
    layout = fused.layout
    chunks = layout.chunk_of[torch.searchsorted(layout.reusable, fused.late)]
    return sum(chunk not in missed for chunk in chunks.tolist())


def escalated_report(discarded: Report, full: FusedPrompt) -> Report:
    """The report of an answer by ``full`` prefill, after the fused prefill of ``discarded``."""
    return replace(
        discarded,
        reused_tokens=0,
        recomputed_tokens=discarded.reused_tokens + discarded.recomputed_tokens,
        charged_budget=discarded.charged_budget + 1,
        chunks=tuple(
            replace(one, recomputed=one.tokens, charged=one.charged + 1) for one in discarded.chunks
        ),
        parts=tuple(
            replace(one, loaded=0, reason=_ESCALATED) if one.loaded else one
            for one in discarded.parts
        ),
        layers=full.layers,
        loaded_text_tokens=0,
        computed=tuple(full.computed.tolist()),
    )


def _rows_by_chunk(fused: FusedPrompt) -> list[list[int]]:
    """Per layer and loaded chunk, the number of the chunk's rows that were computed."""
    layout = fused.layout
    every = fused.recomputed
    chunks = [layout.chunk_of[torch.searchsorted(layout.reusable, rows)] for rows in every]
    return [torch.bincount(chunk, minlength=len(layout.loaded)).tolist() for chunk in chunks]


def _chunk(
    found: PromptLookup,
    misses: Mapping[int, Miss],
    index: int,
    name: str,
    rows: Sequence[int],
    partial: Sequence[int],
) -> ChunkReport:
    """The report of chunk ``index``. ``rows``: the number of its rows that were computed, per
    layer; ``partial``: the same for the layers that are not computed in full."""
    tokens = len(found.layout.prompt.chunks[index])
    start, stop = found.layout.prompt.spans[index]
    if start < found.layout.kept:
        computed = max(0, stop - found.layout.kept)
        return ChunkReport(name, tokens, computed, computed / tokens)
    if (miss := misses.get(index)) is not None:
        return ChunkReport(name, tokens, tokens, 1.0, miss.reason)
    if index in found.cheaper:
        return ChunkReport(name, tokens, tokens, 1.0, cheaper=True)
    return ChunkReport(name, tokens, round(fmean(partial)), fmean(rows) / tokens)


def _fallbacks(done: FusedPrefill) -> list[str]:
    """A message for each reason why chunks were computed instead of loaded, and one if loaded
    chunks could not be ranked by sensitivity."""
    found, blender = done.found, done.blender
    if blender.reuses == "nothing":
        return []
    known = zip(found.layout.loaded, found.layout.sensitivities, strict=True)
    unmeasured = sum(here and not each for here, each in known) if blender.by_sensitivity else 0
    messages = []
    for missed, how in (
        (found.misses, "computed, not loaded"),
        (done.missed, "computed alone before the prompt"),
    ):
        misses = list(missed.values())
        first = {miss.reason: miss for miss in reversed(misses)}
        count = Counter(miss.reason for miss in misses)
        messages += [
            f"{count[reason]} of {len(found.keys)} chunks {how}: {reason}"
            + (f" ({miss.detail})" if miss.detail else "")
            for reason, miss in first.items()
        ]
    if unmeasured:
        messages.append(
            f"{unmeasured} of {len(found.keys)} chunks are stored without their tokens' "
            "sensitivity: those were ranked as average"
        )
    return messages
