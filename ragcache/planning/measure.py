"""Measure speeds: of computing rows among placed ones, of reading, of both at once, of decoding."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, combinations, cycle, islice, pairwise
from statistics import median

import numpy as np
import torch

from ragcache.blend.base import KVSource, Layout, positions
from ragcache.blend.fuse import FusedPrompt, fuse
from ragcache.blend.reuse import Reuse
from ragcache.engine.base import Engine
from ragcache.errors import StoreError
from ragcache.planning.cost_model import Speeds
from ragcache.store.base import ChunkStore, Miss, StoredChunk
from ragcache.store.format.codecs import codec
from ragcache.store.prefetch import LayerReader
from ragcache.types import KVPair, LayerLoad, Prompt, Sampling

logger = logging.getLogger(__name__)

_ROUNDS = 3  # repetitions, of which the median is used
_FEW = 16  # rows of a typical question
#: Rows are doubled until a prefill takes this many times as long as that of few rows, or this many
#: seconds. A GPU takes as long for few rows as for many, until they outweigh the launches of its
#: kernels, which a prediction for long prompts must not miss.
_GROWTH, _ENOUGH_S = 4.0, 0.1
_MOST_ROWS = 1 << 15  # whatever they take
_TOKENS = 2048  # of a prompt, or twice the rows that are computed
_DECODED = 8  # tokens that are decoded
_AT_ONCE, _READINGS = 4, 6  # chunks that are read together; minimum number of reads
_LOADED = 12  # maximum chunks that are loaded into a prompt


def measure_speeds(
    engine: Engine, store: ChunkStore, sample: Sequence[StoredChunk]
) -> Speeds | None:
    """Time ``engine``, and reading the chunks ``sample`` from ``store``. None if no chunk could be
    read."""
    ordered = sorted({s.key: s for s in sample}.values(), key=lambda s: s.payload_bytes)
    batches = [ordered[at : at + _AT_ONCE] for at in range(0, len(ordered), _AT_ONCE)]
    reads = _readings(engine, store, batches)
    if not reads:
        return None
    sound = {chunk.key for batch in batches for chunk in batch}
    sample = [chunk for chunk in sample if chunk.key in sound]
    read_s, byte_s = _fit([(parts, size) for parts, size, _ in reads], [s for *_, s in reads])
    runs, token_s = _runs(engine, round(median(chunk.tokens for chunk in sample)))
    speeds = replace(_compute_speeds(runs), read_s=read_s, byte_s=byte_s)
    if token_s is None:  # the answer ended at once
        token_s = speeds.compute_s(1, runs[-1][1], 0)
    decode_s = {name: _decoding(store, sample, name) for name in store.remote_codecs}
    speeds = replace(speeds, token_s=token_s, decode_s=decode_s)
    return replace(speeds, overlap_penalty=_overlap_penalty(engine, store, sample, speeds))


def _compute_speeds(runs: Sequence[tuple[int, int, float]]) -> Speeds:
    """The speeds of computing that explain (rows, rows of the prompt, seconds) of prefills best;
    all other speeds are 0.

    Either everything adds up, as on a CPU, or computing takes at least as long as launching the
    kernels, as on a GPU: the shortest prefill of rows alone then took as long as the launches.
    """
    seconds = [taken for *_, taken in runs]
    start_s, row_s, pair_s, place_s = _fit(
        [(1.0, rows, rows * total, total - rows) for rows, total, _ in runs], seconds
    )
    found = [Speeds(start_s, row_s, pair_s, place_s, 0, 0, 0)]
    launch_s = min(taken for rows, total, taken in runs if rows == total)
    places = [(s - launch_s) / (total - rows) for rows, total, s in runs if rows < total]
    place_s = max(0.0, min(places, default=0.0))
    busy = [(r, t, s - place_s * (t - r)) for r, t, s in runs]
    busy = [(r, t, computing) for r, t, computing in busy if computing > 1.2 * launch_s]
    if busy:
        row_s, pair_s = _fit([(r, r * t) for r, t, _ in busy], [s for *_, s in busy])
        found.append(Speeds(0, row_s, pair_s, place_s, 0, 0, 0, launch_s=launch_s))

    def error(speeds: Speeds) -> float:
        told = (speeds.compute_s(rows, total, total - rows) for rows, total, _ in runs)
        return sum((guess / taken - 1) ** 2 for guess, taken in zip(told, seconds, strict=True))

    return min(found, key=error)


def _fit(costs: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative coefficients (k,) with which ``costs`` (n, k) best explain ``seconds`` (n, > 0).

    Non-negative least squares of the relative error. Since k is small, every set of coefficients
    that may differ from 0 is tried.
    """
    matrix = np.array(costs, np.float64) / np.array(seconds, np.float64)[:, None]
    scale = np.maximum(np.abs(matrix).max(0), 1e-300)
    columns, best = matrix.shape[1], (np.inf, np.zeros(matrix.shape[1]))
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            part = (matrix / scale)[:, chosen]
            found = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)[0]
            error = float(np.square(part @ found - 1).sum())
            if (found >= 0).all() and error < best[0] - 1e-9:
                prices = np.zeros(columns)
                prices[chosen] = found
                best = error, prices
    return [float(price) for price in best[1] / scale]


def _readings(
    engine: Engine, store: ChunkStore, batches: list[list[StoredChunk]]
) -> list[tuple[int, int, float]]:
    """(layers of chunks read, bytes, seconds) of each batch; if there are few batches, they are
    read several times.

    If there are enough, each chunk is read once, so that the time of chunks outside the page cache
    is measured. With a RAM tier each is read twice, and the second reading is used, since the tier
    caches what is used again. Damaged chunks are removed from their batch.
    """
    found = []
    turns = islice(cycle(batches), max(len(batches), _READINGS))
    for number, batch in enumerate(chain(batches[:1], turns)):
        if not batch:
            continue
        try:
            if store.description.ram_bytes:
                _drained(engine, store, batch)
            seconds = _drained(engine, store, batch)
        except StoreError as error:
            logger.warning("a chunk is left out of the measurement: %s", error)
            batch[:] = [chunk for chunk in batch if error.key not in (None, chunk.key.digest)]
            continue
        if number:  # the first repetition imports what the codec needs
            reads = sum(chunk.spec.layers for chunk in batch)
            found.append((reads, sum(chunk.payload_bytes for chunk in batch), seconds))
    return found


def _drained(engine: Engine, store: ChunkStore, chunks: Sequence[StoredChunk]) -> float:
    """Seconds to read all layers of chunks, and to copy them to the engine's device. Raises
    StoreError if one is damaged."""
    began = time.perf_counter()
    layers = range(chunks[0].spec.layers)
    with LayerReader(store, chunks, upload=engine.upload) as reader:  # closing waits for copies
        reader.start(layers)
        for layer in layers:
            reader.layer(layer)
    return time.perf_counter() - began


def _decoding(store: ChunkStore, sample: Sequence[StoredChunk], name: str) -> float:
    """Seconds to decode a stored byte of the codec ``name``, measured on the first readable chunks,
    which are encoded here; 0 if there is none."""
    coded, found = codec(name), list[float]()
    for chunk in sample:
        if isinstance(kv := store.get(chunk.key), Miss):
            continue
        raws = list(coded.encode_layers(list(zip(kv.keys, kv.values, strict=True))))
        began = time.perf_counter()
        for _ in coded.decode_layers(raws, kv.spec, len(kv.tokens)):
            pass
        found.append((time.perf_counter() - began) / sum(map(len, raws)))
        if len(found) == _ROUNDS:  # each once: what was decoded is remembered
            break
    return median(found) if found else 0.0


def _runs(engine: Engine, chunk: int) -> tuple[list[tuple[int, int, float]], float | None]:
    """(rows computed, rows of the prompt, seconds) of several prefills, the last one of most rows,
    and seconds per decoded token; None if no token was decoded.

    Rows that are not computed are loaded, in chunks of ``chunk`` tokens.
    """
    timed = partial(_timed, engine, chunk)
    most = max(1, engine.context_tokens - _DECODED)
    few = min(_FEW, most)
    timed(few, few, rounds=1)  # warms up
    least, _ = timed(few, few, rounds=1)
    rows, seconds, between = few, least, list[int]()
    while seconds <= min(_ENOUGH_S, _GROWTH * least) and 2 * rows <= min(_MOST_ROWS, most // 2):
        rows *= 2
        seconds, _ = timed(rows, rows, rounds=1)
        between.append(rows)
    total = min(most, max(_TOKENS, 2 * rows))
    middle = between[len(between) // 2] if between else few
    shapes = dict.fromkeys(
        [(few, few), (middle, middle), (rows, rows), (few, total), (rows, total)]
    )
    runs, last = [], None
    for computed, prompt in shapes:
        seconds, last = timed(computed, prompt)
        runs.append((computed, prompt, seconds))
    assert last is not None
    times = [time.perf_counter()]
    for _ in engine.decode(last.prefilled, Sampling(max_tokens=_DECODED)):
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times)][1:]
    return runs, median(steps) if steps else None


def _overlap_penalty(
    engine: Engine, store: ChunkStore, sample: Sequence[StoredChunk], speeds: Speeds
) -> float:
    """The share of the reading time by which reading delays computing, in [0, 1].

    Compares a fused prefill with the same prefill whose KV is in memory. Where possible it computes
    for at least as long as it reads, since waiting for a slow disk is no delay of computing.
    """
    room = min(_TOKENS, engine.context_tokens - _DECODED) // 2
    ends = accumulate(chunk.tokens for chunk in sample)
    chunks = [c for c, end in zip(sample[:_LOADED], ends, strict=False) if end <= room]
    if not chunks:
        return 0.0
    lengths = [chunk.tokens for chunk in chunks]
    size, rows, delays = sum(lengths), _FEW, []
    try:
        reading = _drained(engine, store, chunks)
        while 2 * rows <= room and (speeds.compute_s(rows, size + rows, size) < 1.2 * reading):
            rows *= 2
        for _ in range(_ROUNDS):
            alone, _ = _fused(engine, lengths, rows, _Zeros(engine, lengths))
            with LayerReader(store, chunks, upload=engine.upload) as reader:
                together, _ = _fused(engine, lengths, rows, reader)
            delays.append(together - max(alone, reading))
    except StoreError as error:
        logger.warning("the overlap penalty is not measured: %s", error)
        return 0.0
    load = speeds.load_s(len(chunks) * engine.spec.layers, sum(c.payload_bytes for c in chunks))
    return min(1.0, max(0.0, median(delays)) / load)


def _timed(
    engine: Engine, chunk: int, rows: int, total: int, *, rounds: int = _ROUNDS
) -> tuple[float, FusedPrompt]:
    """Median seconds of a prefill of ``total`` rows, of which ``rows`` are computed and the others
    placed, in chunks of ``chunk`` tokens."""
    lengths = [min(chunk, total - rows - at) for at in range(0, total - rows, chunk)]
    source = _Zeros(engine, lengths)
    runs = [_fused(engine, lengths, rows, source) for _ in range(rounds)]
    return median(seconds for seconds, _ in runs), runs[-1][1]


def _fused(
    engine: Engine, lengths: Sequence[int], rows: int, source: KVSource
) -> tuple[float, FusedPrompt]:
    """Seconds to the logits of a prompt whose chunks, of ``lengths`` tokens, are loaded from
    ``source`` and whose other ``rows`` are computed. The token ids do not matter."""
    token = engine.template.prefix[:1] or (0,)
    prompt = Prompt.of((), tuple(token * length for length in lengths), token * rows)
    layout = Layout(prompt, (True,) * len(lengths), 0, positions(prompt, "consecutive"))
    began = time.perf_counter()
    fused = fuse(engine, Reuse(), layout, source, room=_DECODED)
    fused.prefilled.logits.argmax().item()  # waits for a GPU
    return time.perf_counter() - began, fused


class _Zeros:
    """A KVSource of zeros in the memory of the engine's device, where a layer is that was read and
    copied."""

    def __init__(self, engine: Engine, lengths: Sequence[int]) -> None:
        spec = engine.spec
        dtype = getattr(torch, spec.dtype)
        shapes = [(spec.kv_heads, length, spec.head_dim) for length in lengths]
        layer = [(torch.zeros(s, dtype=dtype), torch.zeros(s, dtype=dtype)) for s in shapes]
        self._layer: list[KVPair] = layer
        if engine.upload is not None and layer:
            self._layer = engine.upload(layer).taken()

    def start(self, layers: Sequence[int]) -> None:
        pass

    def layer(self, layer: int) -> list[KVPair]:
        return self._layer

    def load(self, layer: int) -> LayerLoad:
        return LayerLoad()
