"""A Report as JSON: what the API answers in its ``ragcache`` field, and what the page draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ragcache.store.tiers.ram import RamTier

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.store.base import ChunkStore
    from ragcache.store.remote.store import RemoteTraffic
    from ragcache.types import Answer, Passage, Tokens


def passage_json(passage: Passage) -> dict[str, Any]:
    """A chunk that was found, with its text."""
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
    """What was reused for an answer and what it cost, in values that JSON has.

    The fields of :class:`ragcache.types.Report` but ``computed``, and ``passages``: id and score of
    every chunk. No text of documents, unless with ``trace``, which needs the ``engine`` that
    answered: then ``prompt`` has the prompt's parts, in order. A part's ``kind`` is prefix, chunk
    or question; ``loaded`` says whether its KV came from the store; its ``tokens`` are
    ``[text, share]``, where the share of the layers in which KV was computed goes from 0 (reused)
    to 1. Tokens that only together make a character are one, with the mean of their shares, and
    the texts of a part, joined, are its text.
    """
    found = asdict(answer.report)
    del found["computed"]
    found["parameters"] = dict(answer.report.parameters)
    found["passages"] = [{"id": p.chunk.id, "score": p.score} for p in answer.passages]
    if trace:
        if engine is None:
            raise ValueError("a trace has the text of tokens: give the engine that answered")
        found["prompt"] = _parts(answer, engine)
    return found


def store_json(store: ChunkStore, traffic: RemoteTraffic | None = None) -> dict[str, Any]:
    """What a store, or the tier in RAM before it, holds, and how often it had what was asked for.

    ``tier`` is None where there is none, and so is ``remote``, what has gone to and fro of it.
    """
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
    prompt, report = answer.prompt, answer.report
    layers = len(report.layers)
    shares = [count / layers for count in report.computed]
    prefix, asked = shares[: len(prompt.prefix)], shares[prompt.question_start :]
    loaded = any(share < 1 for share in prefix)
    parts = [_part("prefix", "instructions", loaded, prompt.prefix, prefix, engine)]
    for chunk, tokens, (start, stop) in zip(
        report.chunks, prompt.chunks, prompt.spans, strict=True
    ):
        here = chunk.miss is None and not chunk.cheaper
        parts.append(_part("chunk", chunk.id, here, tokens, shares[start:stop], engine))
    parts.append(_part("question", "question", False, prompt.question, asked, engine))
    return parts


def _part(
    kind: str, name: str, loaded: bool, tokens: Tokens, shares: Sequence[float], engine: ChunkEngine
) -> dict[str, Any]:
    made: list[list[Any]] = []
    open_: list[float] = []  # shares of tokens whose character is not whole yet
    for text, share in zip(engine.pieces(tokens), shares, strict=True):
        open_.append(share)
        if text:
            made.append([text, sum(open_) / len(open_)])
            open_ = []
    return {"kind": kind, "name": name, "loaded": loaded, "tokens": made}
