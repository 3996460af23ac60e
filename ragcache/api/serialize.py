"""Answers and stores as JSON: the ``ragcache`` field of the API, which the page also draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ragcache.store.tiers.ram import RamTier

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.store.base import ChunkStore
    from ragcache.store.remote.store import RemoteTraffic
    from ragcache.types import Answer, Explanation, Passage, Tokens

__all__ = ["report_json"]


def passage_json(passage: Passage) -> dict[str, Any]:
    """A retrieved chunk with its text."""
    chunk = passage.chunk
    return {
        "id": chunk.id,
        "document": chunk.document,
        "score": passage.score,
        "text": chunk.text,
        "metadata": dict(chunk.metadata),
    }


def report_json(
    answer: Answer, engine: ChunkEngine | None = None, *, trace: bool = False
) -> dict[str, Any]:
    """An answer's report in JSON types.

    It has the fields of :class:`ragcache.types.Report` except ``computed``, and ``passages``: the
    id and score of every chunk. With ``trace``, which needs the ``engine`` that answered, it also
    has document text: ``prompt`` lists the prompt's parts, in order. A part's ``kind`` is prefix
    (text before the first chunk), chunk, text (between chunks) or question (the last text);
    ``loaded`` says whether its KV came from the store; its ``tokens`` are
    ``[text, share]``, where share is the share of layers at which the token's KV was computed,
    from 0 (reused) to 1. Tokens that only together form a character are merged into one, with the
    mean of their shares, so the texts of a part, joined, are its text.
    """
    found = asdict(answer.report)
    del found["computed"]
    found["parameters"] = dict(answer.report.parameters)
    found["passages"] = [{"id": p.chunk.id, "score": p.score} for p in answer.passages]
    if trace:
        if engine is None:
            raise ValueError("a trace needs the text of tokens: give the engine that answered")
        found["prompt"] = _parts(answer, engine)
    return found


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """An explanation in JSON types, with its totals and the id and score of every chunk."""
    found = asdict(replace(explanation, passages=()))
    found["passages"] = [{"id": p.chunk.id, "score": p.score} for p in explanation.passages]
    return {**found, "tokens": explanation.tokens, "loaded": explanation.loaded}


def store_json(store: ChunkStore, traffic: RemoteTraffic | None = None) -> dict[str, Any]:
    """A store's size, hits and misses. ``tier`` has those of its RAM tier and ``remote`` the
    traffic with its remote store; each is None if there is none."""
    stats = store.stats()
    return {
        "chunks": stats.chunks,
        "payload_bytes": stats.payload_bytes,
        "hits": stats.hits,
        "misses": dict(stats.misses),
        "tier": asdict(store.ram) if isinstance(store, RamTier) else None,
        "remote": None if traffic is None else asdict(traffic),
    }


def _parts(answer: Answer, engine: ChunkEngine) -> list[dict[str, Any]]:
    prompt, layers = answer.prompt, len(answer.report.layers)
    shares = [count / layers for count in answer.report.computed]
    first = prompt.spans[0][0] if prompt.chunks else prompt.question_start
    parts = []
    for part, report, (start, stop) in zip(
        prompt.parts, answer.report.parts, prompt.part_spans, strict=True
    ):
        kind: str = report.kind
        if kind == "text" and stop <= first:
            kind = "prefix"
        elif kind == "text" and stop == len(prompt):
            kind = "question"
        loaded = report.loaded > 0
        parts.append(_part(kind, report.name, loaded, part.tokens, shares[start:stop], engine))
    return parts


def _part(
    kind: str, name: str, loaded: bool, tokens: Tokens, shares: Sequence[float], engine: ChunkEngine
) -> dict[str, Any]:
    merged: list[list[Any]] = []
    pending: list[float] = []  # shares of tokens whose character is still incomplete
    for text, share in zip(engine.pieces(tokens), shares, strict=True):
        pending.append(share)
        if text:
            merged.append([text, sum(pending) / len(pending)])
            pending = []
    return {"kind": kind, "name": name, "loaded": loaded, "tokens": merged}
