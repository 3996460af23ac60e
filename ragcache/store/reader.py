"""Reading ahead: layer l + 1 is on its way from the store while layer l computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from ragcache.errors import StoreError
from ragcache.store.base import ChunkStore, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec

    Pair = tuple[Tensor, Tensor]


class LayerReader:
    """Loads the layers of several chunks in order, a bounded number of bytes ahead.

    All chunks must have one ``spec``, by default that of the first. No chunks, no layers to load:
    every layer is then an empty list.

    Reading begins at once. At most ``ahead_bytes`` are asked for and not yet handed over by
    :meth:`layer`; one layer always is. ``pool`` may be shared between readers, which then must
    not be consumed on its own threads; without one, the reader has ``workers`` threads of its
    own: two, for with more, Python's lock takes more than they bring (``python -m bench.reading``).
    One consumer thread.

    ``bytes_loaded``: bytes handed over, as they are stored. ``waits``: seconds that each
    :meth:`layer` stood still.
    """

    def __init__(
        self,
        store: ChunkStore,
        chunks: Sequence[Stored],
        spec: KVSpec | None = None,
        *,
        workers: int = 2,
        pool: ThreadPoolExecutor | None = None,
        ahead_bytes: int = 256 << 20,
    ) -> None:
        for chunk in chunks:
            if chunk.spec != (spec or chunks[0].spec):
                raise ValueError(f"a chunk of {chunk.spec} among chunks of {spec}")
        self.bytes_loaded = 0
        self.waits: list[float] = []
        self._store = store
        self._chunks = tuple(chunks)
        self._ahead = ahead_bytes
        self._layers = chunks[0].spec.layers if chunks else 0
        self._stored_bytes = sum(chunk.payload_bytes for chunk in self._chunks)
        self._layer_bytes = sum(chunk.layer_bytes for chunk in self._chunks)
        # A task for each thread and layer: one for each chunk would cost more than a small read.
        self._slices = [self._chunks[n::workers] for n in range(min(workers, len(chunks)))]
        self._pending: deque[list[Future[list[Pair]]]] = deque()
        self._asked = 0  # layers
        self._given = 0
        self._closed = False
        self._held = ExitStack()  # what is read here is not evicted
        self._held.enter_context(store.hold([chunk.key for chunk in self._chunks]))
        self._own = None if pool else ThreadPoolExecutor(workers, "ragcache-reader")
        self._pool = pool or self._own
        self._read_ahead()

    def layer(self, layer: int) -> list[Pair]:
        """(keys, values) per chunk, in order, each (kv_heads, tokens, head_dim).

        Blocks until they are loaded. Ask for 0, 1, 2, ... once each, else ValueError. Raises
        StoreError with ``key`` and ``reason`` where a chunk turns out unusable, and closes the
        reader: make another without that chunk.
        """
        if self._closed:
            raise StoreError("the reader is closed: make another")
        if layer != self._given or (self._chunks and layer >= self._layers):
            raise ValueError(
                f"layer {layer} asked for; the next of {self._layers} is {self._given}"
            )
        began = time.perf_counter()
        try:
            slices = [future.result() for future in self._pending[0]] if self._chunks else []
        except BaseException:
            self.close()
            raise
        self.waits.append(time.perf_counter() - began)
        if self._chunks:
            self._pending.popleft()
        self._given += 1
        self.bytes_loaded = self._stored_bytes * self._given // max(1, self._layers)
        self._read_ahead()
        count = len(slices)
        return [slices[at % count][at // count] for at in range(len(self._chunks))]

    def close(self) -> None:
        """Drop what was not handed over; afterwards no read of this reader is running."""
        self._closed = True
        self._cancel()
        if self._own is not None:
            self._own.shutdown()
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        assert self._pool is not None
        while self._asked < self._layers and (
            not self._pending or (len(self._pending) + 1) * self._layer_bytes <= self._ahead
        ):
            self._pending.append(
                [self._pool.submit(self._load, part, self._asked) for part in self._slices]
            )
            self._asked += 1

    def _load(self, chunks: Sequence[Stored], layer: int) -> list[Pair]:
        """One layer of some chunks; of fewer once the reader is closed, when nobody asks."""
        return [self._read(chunk, layer) for chunk in chunks if not self._closed]

    def _read(self, chunk: Stored, layer: int) -> Pair:
        keys, values = self._store.layer(chunk.key, layer)
        shape = (chunk.spec.kv_heads, chunk.tokens, chunk.spec.head_dim)
        if keys.shape != shape or values.shape != shape:
            raise StoreError(
                f"chunk {chunk.key.digest.hex()[:12]} was replaced by one of another shape: "
                "count it as a miss and compute it again",
                key=chunk.key.digest,
                reason="foreign",
            )
        return keys, values

    def _cancel(self) -> None:
        futures = [future for layer in self._pending for future in layer]
        wait([future for future in futures if not future.cancel()])
