"""Traces of requests, each a list of chunks, from files or synthetic.

A file is JSON Lines with a request per line: ``{"chunks": [{"id": "a#0", "tokens": 123}, ...]}``,
or just the list of chunks; a chunk may also be ``["a#0", 123]``. Other fields are ignored.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ragcache.errors import ConfigError, SourceError

__all__ = ["SYNTHETIC_TRACES", "load_trace"]


class TraceChunk(NamedTuple):
    """A chunk that a request retrieves."""

    id: str
    tokens: int


TraceRequest = tuple[TraceChunk, ...]
Trace = Sequence[TraceRequest]


def load_trace(path: Path) -> list[TraceRequest]:
    """Read a trace. Raises SourceError, which names the malformed line, and for an empty file."""
    trace: list[TraceRequest] = []
    tokens: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    trace.append(_request(line, f"{path}:{number}", tokens))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"cannot read the trace {path}: {error}. Name a file, or one of "
            f"{', '.join(SYNTHETIC_TRACES)}."
        ) from error
    if not trace:
        raise SourceError(f"{path} has no requests: write one JSON object per line")
    return trace


def _request(line: str, where: str, tokens: dict[str, int]) -> TraceRequest:
    """Parse a line; ``tokens`` collects each chunk's length, to detect contradictions."""
    try:
        entry = json.loads(line)
        request = tuple(map(_chunk, entry["chunks"] if isinstance(entry, dict) else entry))
        for chunk in request:
            if (known := tokens.setdefault(chunk.id, chunk.tokens)) != chunk.tokens:
                raise ValueError(f"chunk {chunk.id!r} has {chunk.tokens} tokens, before {known}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SourceError(
            f'{where}: expected {{"chunks": [{{"id": "...", "tokens": 123}}, ...]}}, but {error!r}'
        ) from error
    return request


def _chunk(entry: Any) -> TraceChunk:
    """Parse a chunk. Raises KeyError, TypeError or ValueError if it is malformed."""
    id, tokens = (entry["id"], entry["tokens"]) if isinstance(entry, dict) else entry
    if not isinstance(id, str) or type(tokens) is not int or not 0 < tokens < 2**31:
        raise ValueError(f"a chunk's id is text and its tokens are a count, not {entry!r}")
    return TraceChunk(id, tokens)


def zipf_trace(
    requests: int,
    chunks: int,
    exponent: float = 1.0,
    per_request: int = 8,
    seed: int = 0,
    tokens: tuple[int, int] = (64, 512),
) -> list[TraceRequest]:
    """Requests for ``per_request`` chunks each, the k-th most popular with weight k^-exponent.

    Lengths are uniform in ``tokens``, independent of popularity. The same arguments give the same
    trace. Raises ConfigError for arguments out of range.
    """
    if (
        not 0 < 2 * per_request <= chunks
        or not 0 <= exponent <= 2
        or not 0 < tokens[0] <= tokens[1]
    ):
        raise ConfigError(
            f"cannot draw {per_request} of {chunks} chunks of {tokens} tokens by k^-{exponent}: "
            "ask for at most half of the chunks, an exponent from 0 to 2, and 1 token or more"
        )
    random = Random(seed)
    lengths = [
        tokens[0] + int(random.random() * (tokens[1] + 1 - tokens[0])) for _ in range(chunks)
    ]
    shares = list(accumulate(rank**-exponent for rank in range(1, chunks + 1)))
    trace = []
    for _ in range(requests):
        drawn: dict[int, None] = {}
        while len(drawn) < per_request:
            drawn[min(bisect_right(shares, random.random() * shares[-1]), chunks - 1)] = None
        trace.append(tuple(TraceChunk(f"chunk{number}", lengths[number]) for number in drawn))
    return trace


def topic_trace(
    requests: int,
    documents: int,
    each: int = 16,
    exponent: float = 1.0,
    per_request: int = 8,
    seed: int = 0,
    tokens: int = 256,
) -> list[TraceRequest]:
    """Requests for chunks of one document each, the k-th most popular with weight k^-exponent.

    ``per_request`` of a document's ``each`` chunks are drawn uniformly. Raises ConfigError if that
    is more than ``each``.
    """
    if not 0 < per_request <= each or documents < 1:
        raise ConfigError(
            f"cannot draw {per_request} of {each} chunks of {documents} documents: ask for at most "
            "as many as a document has"
        )
    random = Random(seed)
    shares = list(accumulate(rank**-exponent for rank in range(1, documents + 1)))
    trace = []
    for _ in range(requests):
        topic = min(bisect_right(shares, random.random() * shares[-1]), documents - 1)
        drawn = random.sample(range(each), per_request)
        trace.append(tuple(TraceChunk(f"document{topic}#{number}", tokens) for number in drawn))
    return trace


def add_scans(trace: Trace, every: int, length: int, seed: int = 0) -> list[TraceRequest]:
    """``trace`` with a scan of ``length`` requests after every ``every`` requests.

    A scan's requests have as many chunks as the request before the scan, and each of these chunks
    is requested only once. Lengths are drawn from those of the trace. Raises ConfigError for
    ``every`` < 1.
    """
    if every < 1:
        raise ConfigError(f"a scan every {every} requests: let at least 1 request pass")
    random = Random(seed)
    lengths = [chunk.tokens for request in trace for chunk in request]
    mixed: list[TraceRequest] = []
    cold = 0
    for number, request in enumerate(trace, 1):
        mixed.append(request)
        for _ in range(length if number % every == 0 else 0):
            drawn = [lengths[int(random.random() * len(lengths))] for _ in request]
            mixed.append(tuple(TraceChunk(f"cold{cold + i}", n) for i, n in enumerate(drawn)))
            cold += len(drawn)
    return mixed


#: Synthetic traces by name.
SYNTHETIC_TRACES: dict[str, Callable[[], list[TraceRequest]]] = {
    "zipf": lambda: zipf_trace(3000, 2000),
    "topics": lambda: topic_trace(3000, 500),
    "scans": lambda: add_scans(zipf_trace(3000, 2000), every=100, length=40),
}
