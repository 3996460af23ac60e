"""Compute batches by workers on Ray. Workers only compute: the driver plans and stores.

So a store has one writer, keys and batches are those of a local run, and a batch whose worker dies
is given to another one. Workers use as many threads as the driver, because the last bits of KV can
depend on that: on the same hardware, the store is bit-identical to that of a local run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ragcache.core.precompute import Batch, compute_batch
from ragcache.errors import ConfigError, ModelError, RagCacheError
from ragcache.store.format.codecs.base import from_bytes, to_bytes
from ragcache.store.key import ChunkKey
from ragcache.types import ChunkKV, KVSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ragcache.batch.run import BatchComputer, ComputedBatches
    from ragcache.engine.base import Engine
    from ragcache.types import Fingerprint, Tokens

__all__ = ["RayCluster", "compute_on_ray"]

_BATCHES_PER_WORKER = 2  # one that is computed and one that waits
MAX_ATTEMPTS = 3  # workers that die over one batch before the run fails
_START_TIMEOUT_S = 600.0  # to schedule a worker and load its model

#: A serialised chunk: the bytes of all layers' keys and then values, and its sensitivity.
_SentChunk = tuple["NDArray[np.uint8]", tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Where workers run, and their resources. ``address`` None is this machine."""

    address: str | None = None
    workers: int = 1
    gpus: float = 0.0  # per worker


@dataclass(eq=False)
class ChunkWorker:
    """A model in a worker process, loaded when it is first used."""

    model: str
    options: dict[str, str]
    fingerprint: str  # of the driver's model, hex
    threads: int
    _engine: Engine | None = None  # not a cached_property, whose lock cannot be pickled

    def engine(self) -> Engine:
        """The model. Raises ModelError if it is not the driver's."""
        import torch

        from ragcache.engine.hf.engine import TransformersEngine
        from ragcache.models import model_path

        if self._engine is not None:
            return self._engine
        torch.set_num_threads(self.threads)
        engine = TransformersEngine.load(model_path(self.model), **self.options)
        if engine.fingerprint.digest.hex() != self.fingerprint:
            raise ModelError(
                f"a worker has loaded {engine.fingerprint}, which is not the driver's model: give "
                "all machines the same model files and the same version of transformers"
            )
        self._engine = engine
        return engine

    def ready(self) -> bool:
        """Load the model."""
        return bool(self.engine())

    def compute(self, context: Tokens, chunks: list[Tokens]) -> list[_SentChunk]:
        """The KV of chunks that are computed after the tokens ``context``."""
        engine = self.engine()
        keys = tuple(ChunkKey(engine.fingerprint, tokens, context) for tokens in chunks)
        return [_serialize(kv) for kv in compute_batch(engine, Batch(context, keys))]


def compute_on_ray(
    cluster: RayCluster,
    *,
    model: str,
    options: dict[str, str],
    fingerprint: Fingerprint,
    spec: KVSpec,
    batch_tokens: int,
) -> BatchComputer:
    """A computer of batches by workers that load ``model`` with these ``options``.

    ``options`` are those of :meth:`TransformersEngine.load`. Raises ConfigError if Ray is not
    installed. The run raises RagCacheError if no worker can be started, or if one batch ends
    :data:`MAX_ATTEMPTS` workers, and ModelError if a worker's model is not the driver's. Ray is
    shut down at the end, unless it was running before.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(
            "Ray is not installed, which --engine ray needs. "
            'Run `pip install "ragcache-fusion[ray]"`.'
        ) from None

    def compute_batches(batches: Iterable[Batch]) -> ComputedBatches:
        import torch

        started = not ray.is_initialized()
        if started:
            _start(cluster, spec.chunk_bytes(batch_tokens))
        remote = ray.remote(num_cpus=1, num_gpus=cluster.gpus)(ChunkWorker)
        given = (model, options, fingerprint.digest.hex(), torch.get_num_threads())
        pool = _Pool(lambda: remote.remote(*given), cluster.workers, spec)
        try:
            yield from pool.compute(batches)
        finally:
            pool.close()
            if started:
                ray.shutdown()

    return compute_batches


class _Pool:
    """Workers and their batches. ``make`` starts another worker."""

    def __init__(self, make: Any, workers: int, spec: KVSpec) -> None:
        self._make, self._spec = make, spec
        self._workers: dict[int, Any] = {number: make() for number in range(workers)}
        self._next = workers
        self._free: deque[int] = deque(
            number for number in self._workers for _ in range(_BATCHES_PER_WORKER)
        )
        self._running: dict[Any, tuple[int, Batch]] = {}
        self._lost: deque[Batch] = deque()
        self._tries: Counter[Batch] = Counter()

    def compute(self, batches: Iterable[Batch]) -> ComputedBatches:
        import ray

        self._wait_for_worker()
        source = iter(batches)
        while True:
            while self._free and (batch := self._next_batch(source)) is not None:
                number = self._free.popleft()
                chunks = [key.tokens for key in batch.keys]
                ref = self._workers[number].compute.remote(batch.context, chunks)
                self._running[ref] = number, batch
            if not self._running:
                return
            [ref], _ = ray.wait(list(self._running))
            number, batch = self._running.pop(ref)
            try:
                sent = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                raise _unwrap_error(error) from error
            except ray.exceptions.RayError as error:  # the worker or its machine has died
                self._replace_worker(number, batch, error)
                continue
            if number in self._workers:
                self._free.append(number)
            pairs = zip(batch.keys, sent, strict=True)
            yield batch, [_deserialize(key.tokens, one, self._spec) for key, one in pairs]

    def close(self) -> None:
        import ray

        for worker in self._workers.values():
            ray.kill(worker)

    def _next_batch(self, source: Any) -> Batch | None:
        return self._lost.popleft() if self._lost else next(source, None)

    def _wait_for_worker(self) -> None:
        """Wait until a worker has loaded its model. Raises its error."""
        import ray

        ready = [worker.ready.remote() for worker in self._workers.values()]
        done, _ = ray.wait(ready, timeout=_START_TIMEOUT_S)
        if not done:
            raise RagCacheError(
                f"no worker has started within {_START_TIMEOUT_S:.0f} s: the cluster has "
                f"{ray.cluster_resources()}, and a worker needs a CPU and the GPUs that you named"
            )
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise _unwrap_error(error) from error
        except ray.exceptions.RayError:
            pass  # it has died: its first batch fails, and another worker takes its place

    def _replace_worker(self, number: int, batch: Batch, error: Exception) -> None:
        """Give the batch of a dead worker to others, and start another worker in its place."""
        self._tries[batch] += 1
        if self._tries[batch] == MAX_ATTEMPTS:
            raise RagCacheError(
                f"{MAX_ATTEMPTS} workers have died over a batch of {batch.tokens} tokens, the last "
                f"of this: {error} If memory was short, lower --batch-tokens or --workers."
            ) from error
        self._lost.append(batch)
        if self._workers.pop(number, None) is not None:
            self._workers[self._next] = self._make()
            self._free.extend([self._next] * _BATCHES_PER_WORKER)
            self._free = deque(free for free in self._free if free != number)
            self._next += 1


def _start(cluster: RayCluster, batch_bytes: int) -> None:
    """Connect to the cluster, or start one on this machine with memory for the workers."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.address is not None:
        ray.init(cluster.address, **quiet)
        return
    room = max(128 << 20, 2 * (_BATCHES_PER_WORKER + 1) * cluster.workers * batch_bytes)
    ray.init(num_cpus=cluster.workers, include_dashboard=False, object_store_memory=room, **quiet)


def _unwrap_error(error: Any) -> Exception:
    """The error that a worker raised; wrapped, unless it is a RagCacheError."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, RagCacheError):
        return cause
    return RagCacheError(f"a worker has failed: {error}. Run it again: stored chunks are kept.")


def _serialize(kv: ChunkKV) -> _SentChunk:
    both = [to_bytes(tensor) for tensor in (*kv.keys, *kv.values)]
    return np.concatenate(both), kv.sensitivity


def _deserialize(tokens: Tokens, sent: _SentChunk, spec: KVSpec) -> ChunkKV:
    data, sensitivity = sent
    shape = (2, spec.layers, spec.kv_heads, len(tokens), spec.head_dim)
    keys, values = from_bytes(np.array(data), spec.dtype, shape)  # Ray's own memory is read-only
    return ChunkKV(tokens, tuple(keys), tuple(values), sensitivity)
