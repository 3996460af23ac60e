"""Batches computed by workers on Ray. They compute and nothing else: the driver plans and stores.

So a store has one writer, keys and batches are those of a local run, and a batch that is lost with
its worker is given to another. A worker takes as many threads as the driver has, for the last bits
of KV may depend on that: on like hardware, the store is bit-equal to a local run's.
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

    from ragcache.batch.run import Computed, Computing
    from ragcache.engine.base import Engine
    from ragcache.types import Fingerprint, Tokens

AHEAD = 2  # batches that a worker has: one to compute, one that waits
MOST_TRIES = 3  # workers that may die over one batch
_START_S = 600.0  # to find room for a worker, and to load its model

#: A chunk on its way: bytes of all layers' keys and then values, and its sensitivity.
Sent = tuple["NDArray[np.uint8]", tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where workers are, and what each takes. ``address``: of a cluster; None: this machine."""

    address: str | None = None
    workers: int = 1
    gpus: float = 0.0  # of each worker


@dataclass(eq=False)
class Worker:
    """A model in a process of its own, loaded when it is first needed."""

    model: str
    options: dict[str, str]
    fingerprint: str  # that the driver's model has
    threads: int
    _engine: Engine | None = None  # no cached_property: Ray cannot send its lock

    def engine(self) -> Engine:
        """Raises ModelError where it is not the driver's."""
        import torch

        from ragcache.engine.hf.engine import TransformersEngine

        if self._engine is not None:
            return self._engine
        torch.set_num_threads(self.threads)
        engine = TransformersEngine.load(self.model, **self.options)
        if engine.fingerprint.digest.hex() != self.fingerprint:
            raise ModelError(
                f"a worker has loaded {engine.fingerprint}, which is not the driver's model: give "
                "all machines the same model files and the same version of transformers"
            )
        self._engine = engine
        return engine

    def ready(self) -> bool:
        return bool(self.engine())

    def compute(self, behind: Tokens, chunks: list[Tokens]) -> list[Sent]:
        engine = self.engine()
        keys = tuple(ChunkKey(engine.fingerprint, tokens, behind) for tokens in chunks)
        return [_sent(kv) for kv in compute_batch(engine, Batch(behind, keys))]


def on_ray(
    cluster: Cluster,
    *,
    model: str,
    options: dict[str, str],
    fingerprint: Fingerprint,
    spec: KVSpec,
    batch_tokens: int,
) -> Computing:
    """By workers that load ``model`` with ``options`` of :meth:`TransformersEngine.load`.

    Raises ConfigError where Ray is not installed. The run raises RagCacheError where no worker can
    be had, or one batch has ended MOST_TRIES of them, and ModelError where a worker's model is
    another. A Ray that was not running is shut down at the end.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(
            "Ray is not installed, which --engine ray needs. "
            'Run `pip install "ragcache-fusion[ray]"`.'
        ) from None

    def computing(every: Iterable[Batch]) -> Computed:
        import torch

        started = not ray.is_initialized()
        if started:
            _start(cluster, spec.chunk_bytes(batch_tokens))
        remote = ray.remote(num_cpus=1, num_gpus=cluster.gpus)(Worker)
        given = (model, options, fingerprint.digest.hex(), torch.get_num_threads())
        pool = _Pool(lambda: remote.remote(*given), cluster.workers, spec)
        try:
            yield from pool.computed(every)
        finally:
            pool.end()
            if started:
                ray.shutdown()

    return computing


class _Pool:
    """Workers, and who has which batch. ``make`` starts another one."""

    def __init__(self, make: Any, workers: int, spec: KVSpec) -> None:
        self._make, self._spec = make, spec
        self._workers: dict[int, Any] = {number: make() for number in range(workers)}
        self._next = workers
        self._free: deque[int] = deque(number for number in self._workers for _ in range(AHEAD))
        self._running: dict[Any, tuple[int, Batch]] = {}
        self._lost: deque[Batch] = deque()
        self._tries: Counter[Batch] = Counter()

    def computed(self, every: Iterable[Batch]) -> Computed:
        import ray

        self._wait_for_one()
        source = iter(every)
        while True:
            while self._free and (batch := self._another(source)) is not None:
                number = self._free.popleft()
                chunks = [key.tokens for key in batch.keys]
                ref = self._workers[number].compute.remote(batch.behind, chunks)
                self._running[ref] = number, batch
            if not self._running:
                return
            [ref], _ = ray.wait(list(self._running))
            number, batch = self._running.pop(ref)
            try:
                sent = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                raise _as_own(error) from error
            except ray.exceptions.RayError as error:  # the worker has died, or its machine
                self._lose(number, batch, error)
                continue
            if number in self._workers:
                self._free.append(number)
            pairs = zip(batch.keys, sent, strict=True)
            yield batch, [_received(key.tokens, one, self._spec) for key, one in pairs]

    def end(self) -> None:
        import ray

        for worker in self._workers.values():
            ray.kill(worker)

    def _another(self, source: Any) -> Batch | None:
        return self._lost.popleft() if self._lost else next(source, None)

    def _wait_for_one(self) -> None:
        """Until a worker has loaded its model. Raises what kept it from that."""
        import ray

        ready = [worker.ready.remote() for worker in self._workers.values()]
        done, _ = ray.wait(ready, timeout=_START_S)
        if not done:
            raise RagCacheError(
                f"no worker has started within {_START_S:.0f} s: the cluster has "
                f"{ray.cluster_resources()}, and a worker takes a CPU and the GPUs that you named"
            )
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise _as_own(error) from error
        except ray.exceptions.RayError:
            pass  # it has died: its first batch will tell, and another takes its place

    def _lose(self, number: int, batch: Batch, error: Exception) -> None:
        """A worker has died: its batches are for others, and another worker takes its place."""
        self._tries[batch] += 1
        if self._tries[batch] == MOST_TRIES:
            raise RagCacheError(
                f"{MOST_TRIES} workers have died over a batch of {batch.tokens} tokens, the last "
                f"of this: {error} If memory was short, lower --batch-tokens or --workers."
            ) from error
        self._lost.append(batch)
        if self._workers.pop(number, None) is not None:
            self._workers[self._next] = self._make()
            self._free.extend([self._next] * AHEAD)
            self._free = deque(free for free in self._free if free != number)
            self._next += 1


def _start(cluster: Cluster, batch_bytes: int) -> None:
    """Join the cluster, or start one on this machine that has room for the workers."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.address is not None:
        ray.init(cluster.address, **quiet)
        return
    room = max(128 << 20, 2 * (AHEAD + 1) * cluster.workers * batch_bytes)
    ray.init(num_cpus=cluster.workers, include_dashboard=False, object_store_memory=room, **quiet)


def _as_own(error: Any) -> Exception:
    """What a worker raised, if it is one of ours; else an error that shows it."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, RagCacheError):
        return cause
    return RagCacheError(f"a worker has failed: {error}. Run it again: what is stored stays.")


def _sent(kv: ChunkKV) -> Sent:
    both = [to_bytes(tensor) for tensor in (*kv.keys, *kv.values)]
    return np.concatenate(both), kv.sensitivity


def _received(tokens: Tokens, sent: Sent, spec: KVSpec) -> ChunkKV:
    data, sensitivity = sent
    shape = (2, spec.layers, spec.kv_heads, len(tokens), spec.head_dim)
    keys, values = from_bytes(np.array(data), spec.dtype, shape)  # Ray's own memory is read-only
    return ChunkKV(tokens, tuple(keys), tuple(values), sensitivity)
