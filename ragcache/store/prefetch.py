"""Reading ahead: layers l + 1, l + 2 are on their way from the store while layer l computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from ragcache.errors import StoreError
from ragcache.store.base import AT_ONCE, ChunkStore, StoredChunk
from ragcache.types import LayerUpload, Load

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import KVSpec

    Pair = tuple[Tensor, Tensor]


AHEAD = 4  # layers
#: Of a chunk's layer, below which one thread reads faster than two, which pass Python's lock to and
#: fro; with more threads than two, large layers do not come faster either.
FEW_BYTES = 128 << 10


class LayerReader:
    """Loads the layers of several chunks in order, a bounded number of them ahead.

    All chunks must have one ``spec``, by default that of the first. No chunks, no layers to load:
    every layer is then an empty list.

    From :meth:`start` on, at most ``ahead`` layers, and no more than ``ahead_bytes`` of them, are
    asked for and not yet handed over by :meth:`layer`; one always is. ``pool`` may be shared
    between readers, which then must not be consumed on its own threads; without one, the reader
    has ``workers`` threads of its own, each of which reads one layer of all chunks at a time; by
    default one or two, or as many as layers ahead where chunks are distant.
    ``upload`` begins to copy a layer to a device; the thread that has read it calls it. One
    consumer thread.
    """

    def __init__(
        self,
        store: ChunkStore,
        chunks: Sequence[StoredChunk],
        spec: KVSpec | None = None,
        *,
        workers: int | None = None,
        pool: ThreadPoolExecutor | None = None,
        ahead: int = AHEAD,
        ahead_bytes: int = 256 << 20,
        upload: Callable[[Sequence[Pair]], LayerUpload] | None = None,
    ) -> None:
        wanted = spec or (chunks[0].spec if chunks else None)
        for chunk in chunks:
            if chunk.spec != wanted:
                raise ValueError(f"a chunk of {chunk.spec} among chunks of {wanted}")
        self._store = store
        self._chunks = tuple(chunks)
        layer_bytes = sum(chunk.layer_bytes for chunk in self._chunks)
        self._ahead = max(1, min(ahead, ahead_bytes // max(1, layer_bytes)))
        self._upload = upload
        self._layers: Sequence[int] | None = None  # those to load, once started
        self._pending: deque[Future[list[Pair] | LayerUpload]] = deque()
        self._copying: deque[LayerUpload] = deque()  # whose copies may not have been made yet
        self._loads: dict[int, Load] = {}
        self._asked = self._given = 0
        self._closed = False
        self._held = ExitStack()  # what is read here is not evicted
        self._held.enter_context(store.hold([chunk.key for chunk in self._chunks]))
        if workers is None:
            small = layer_bytes < FEW_BYTES * len(self._chunks)
            workers = 1 if small else AT_ONCE
            if any(chunk.distant for chunk in self._chunks):  # a network is waited for
                workers = self._ahead
        self._own = None if pool else ThreadPoolExecutor(workers, "ragcache-reader")
        self._pool = pool or self._own

    def start(self, layers: Sequence[int]) -> None:
        """Begin to read: these will be asked for, in this order, once each."""
        if self._layers is not None:
            raise ValueError("the reader has been started")
        self._layers = layers
        self._read_ahead()

    def layer(self, layer: int) -> list[Pair]:
        """(keys, values) per chunk, in order, each (kv_heads, tokens, head_dim), to be read only.

        Blocks until they are loaded. ValueError for another layer than the next of those that were
        given to :meth:`start`. Raises StoreError with ``key`` and ``reason`` where a chunk turns
        out unusable, and closes the reader: make another without that chunk.
        """
        if self._closed:
            raise StoreError("the reader is closed: make another")
        left = (self._layers or ())[self._given :]
        if not left or layer != left[0]:
            raise ValueError(f"layer {layer} asked for; to come are {list(left)}")
        self._given += 1
        if not self._chunks:
            self._loads[layer] = Load()
            return []
        try:
            loaded = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._read_ahead()
        return loaded if isinstance(loaded, list) else self._taken(loaded)

    def load(self, layer: int) -> Load:
        """How a layer that was handed over came here; on a device, when its copying had begun."""
        return self._loads[layer]

    def close(self) -> None:
        """Drop what was not handed over; afterwards no read of this reader is running."""
        self._closed = True
        wait([future for future in self._pending if not future.cancel()])
        if self._own is not None:
            self._own.shutdown()
        while self._copying:
            self._copying.popleft().finish()
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        assert self._pool is not None and self._layers is not None
        while self._chunks and self._asked < len(self._layers) and len(self._pending) < self._ahead:
            self._pending.append(self._pool.submit(self._read, self._layers[self._asked]))
            self._asked += 1

    def _read(self, layer: int) -> list[Pair] | LayerUpload:
        began = time.perf_counter()
        pairs = self._store.layers(self._chunks, layer)
        for chunk, (keys, values) in zip(self._chunks, pairs, strict=True):
            shape = (chunk.spec.kv_heads, chunk.tokens, chunk.spec.head_dim)
            if keys.shape != shape or values.shape != shape:
                raise StoreError(
                    f"chunk {chunk.key.digest.hex()[:12]} was replaced by one of another shape: "
                    "count it as a miss and compute it again",
                    key=chunk.key.digest,
                    reason="foreign",
                )
        loaded = pairs if self._upload is None else self._upload(pairs)
        size = sum(chunk.layer_sizes[layer] for chunk in self._chunks)
        self._loads[layer] = Load(size, began, time.perf_counter())
        return loaded

    def _taken(self, copying: LayerUpload) -> list[Pair]:
        """A layer on its device. Waits until few layers at most are still being copied from host
        memory."""
        while len(self._copying) >= self._ahead:
            self._copying.popleft().finish()
        self._copying.append(copying)
        return copying.taken()
