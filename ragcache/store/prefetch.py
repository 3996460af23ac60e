"""Prefetching: layers l + 1, l + 2, ... are read from the store while layer l computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from ragcache.errors import StoreError
from ragcache.store.base import READ_THREADS, ChunkStore, StoredChunk
from ragcache.store.format.codecs import find_codec
from ragcache.types import KVPair, LayerLoad, LayerUpload
from ragcache.util.cores import usable_cores

if TYPE_CHECKING:
    from ragcache.types import KVSpec

__all__ = ["LAYERS_AHEAD", "LayerReader"]


LAYERS_AHEAD = 4  # layers read ahead by default
#: Bytes of a chunk's layer below which one thread reads faster than two, which contend for the GIL.
#: For large layers, more than two threads are no faster than two.
_FEW_BYTES = 128 << 10
#: Cores up to which no thread reads ahead for a model on the CPU: it computes with all of them, and
#: each of its operations would wait for the thread that shares its core with a reader.
_FEW_CORES = 4


class LayerReader:
    """Loads the layers of several chunks in order, a bounded number of them ahead.

    All chunks must have one ``spec``, by default that of the first. Without chunks, every layer is
    an empty list.

    After :meth:`start`, up to ``ahead`` layers of up to ``ahead_bytes`` in all, but at least one,
    are requested before :meth:`layer` takes them. ``pool`` may be shared between readers; its own
    threads must then not consume them. Without a pool, the reader has ``workers`` threads, each of
    which reads one layer of all chunks at a time: by default one or two, or as many as layers ahead
    where chunks are remote. With none, which is the default where a model on few cores reads from
    the disk here what takes no decoding, :meth:`layer` reads, while the system reads ahead from the
    disk. ``upload`` starts the copy of a layer to a device, and is called by the thread that has
    read it. For one consumer thread.
    """

    def __init__(
        self,
        store: ChunkStore,
        chunks: Sequence[StoredChunk],
        spec: KVSpec | None = None,
        *,
        workers: int | None = None,
        pool: ThreadPoolExecutor | None = None,
        ahead: int = LAYERS_AHEAD,
        ahead_bytes: int = 256 << 20,
        upload: Callable[[Sequence[KVPair]], LayerUpload] | None = None,
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
        self._layers: Sequence[int] | None = None  # to load, once started
        self._pending: deque[Future[list[KVPair] | LayerUpload]] = deque()
        self._copying: deque[LayerUpload] = deque()  # whose copies may not be complete yet
        self._loads: dict[int, LayerLoad] = {}
        self._asked = self._given = 0
        self._closed = False
        self._held = ExitStack()  # leases: chunks that are read are not evicted
        self._held.enter_context(store.lease([chunk.key for chunk in self._chunks]))
        if workers is None:
            workers = self._workers(layer_bytes)
        has_own = pool is None and workers
        self._own = ThreadPoolExecutor(workers, "ragcache-reader") if has_own else None
        self._pool = pool or self._own

    def start(self, layers: Sequence[int]) -> None:
        """Start reading the layers that :meth:`layer` will be called with, in this order."""
        if self._layers is not None:
            raise ValueError("the reader has been started")
        self._layers = layers
        self._read_ahead()

    def layer(self, layer: int) -> list[KVPair]:
        """(keys, values) per chunk, in order, each (kv_heads, tokens, head_dim), read-only.

        Blocks until they are loaded. Raises ValueError for a layer other than the next of those
        given to :meth:`start`; StoreError with ``key`` and ``reason`` where a chunk cannot be used,
        which closes the reader: make another one without that chunk.
        """
        if self._closed:
            raise StoreError("the reader is closed: make another")
        left = (self._layers or ())[self._given :]
        if not left or layer != left[0]:
            raise ValueError(f"layer {layer} asked for; to come are {list(left)}")
        self._given += 1
        if not self._chunks:
            self._loads[layer] = LayerLoad()
            return []
        try:
            given = self._pending.popleft().result() if self._pool else self._read(layer)
        except BaseException:
            self.close()
            raise
        self._read_ahead()
        return given if isinstance(given, list) else self._taken(given)

    def load(self, layer: int) -> LayerLoad:
        """Bytes and times of loading a layer that :meth:`layer` has returned; on a device, up to
        the start of its copy."""
        return self._loads[layer]

    def close(self) -> None:
        """Cancel what is pending, and wait for running reads and copies."""
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

    def _workers(self, layer_bytes: int) -> int:
        """The default number of threads."""
        if any(chunk.is_remote for chunk in self._chunks):  # a network is waited for
            return self._ahead
        if self._upload is None and usable_cores() <= _FEW_CORES:
            coders = [find_codec(chunk.key.codec) for chunk in self._chunks]
            sizes = (
                None if isinstance(coded, str) else coded.layer_bytes(chunk.spec, chunk.tokens)
                for coded, chunk in zip(coders, self._chunks, strict=True)
            )
            if all(size is not None for size in sizes):
                return 0
        return 1 if layer_bytes < _FEW_BYTES * len(self._chunks) else READ_THREADS

    def _read_ahead(self) -> None:
        assert self._layers is not None
        if self._pool is None:
            return
        while self._chunks and self._asked < len(self._layers) and len(self._pending) < self._ahead:
            self._pending.append(self._pool.submit(self._read, self._layers[self._asked]))
            self._asked += 1

    def _read(self, layer: int) -> list[KVPair] | LayerUpload:
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
        self._loads[layer] = LayerLoad(size, began, time.perf_counter())
        return loaded

    def _taken(self, copying: LayerUpload) -> list[KVPair]:
        """A layer on its device. Limits the number of unfinished copies to that of layers ahead."""
        while len(self._copying) >= self._ahead:
            self._copying.popleft().finish()
        self._copying.append(copying)
        return copying.taken()
