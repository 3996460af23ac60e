"""The KV connector, which vLLM's scheduler and workers call.

Started with ``--kv-transfer-config '{"kv_connector": "RagCacheConnector",
"kv_connector_module_path": "ragcache.vllm.connector", "kv_role": "kv_both",
"kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "FOLDER"}}'``
and ``--worker-cls ragcache.vllm.cpu.CPUWorker`` (or ``ragcache.vllm.gpu.GPUWorker``).

All work is done before a forward pass, between two steps: vLLM's own forward pass, with its CUDA
graphs and compiled code, is not changed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import __version__
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from ragcache.engine.hf.model_info import ModelInfo
from ragcache.errors import ConfigError, RagCacheError, StoreError
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey, with_codec
from ragcache.types import Fingerprint
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies
from ragcache.vllm.jobs import JobRunner, TenantStores, TensorParallelRank, refusal_reply
from ragcache.vllm.planner import LoadJob, PlannedRequest, Planner, merge_failures
from ragcache.vllm.slots import blocks_before
from ragcache.vllm.support import VllmSetup, check_vllm

__all__ = ["RagCacheConnector"]

logger = logging.getLogger("vllm.ragcache")


@dataclass
class _StepJobs(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where this is typed
    """The jobs of one step, from the scheduler to the workers."""

    fingerprint: Fingerprint  # of the model, whose weights only one process hashes
    jobs: list[LoadJob] = field(default_factory=list)


@dataclass
class _FailedJobs(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """The jobs that failed in a worker: the reason, by request."""

    requests: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> _FailedJobs:
        assert isinstance(other, _FailedJobs)
        return _FailedJobs(merge_failures((self.requests, other.requests)))


class RagCacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One instance is in the scheduler, and one in every worker. Raises ConfigError."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_vllm(_setup(vllm_config, kv_cache_config))
        extra = self._kv_transfer_config.kv_connector_extra_config
        if unknown := set(extra) - {"store", "codec", "ram_bytes"}:
            raise ConfigError(
                f"kv_connector_extra_config has {', '.join(sorted(unknown))}: it takes store (the "
                "folder of the store), codec and ram_bytes"
            )
        if "store" not in extra:
            raise ConfigError(
                "kv_connector_extra_config names no store: add store, the folder of the store"
            )
        self.root = Path(extra["store"])
        self.block_size: int = vllm_config.cache_config.block_size
        if role == KVConnectorRole.SCHEDULER:
            model = vllm_config.model_config
            dtype = str(model.dtype).removeprefix("torch.")
            self._codec = extra.get("codec") or _codec_of(self.root)
            info = ModelInfo.of(model.model, dtype, self._codec or "raw")
            self._use_fingerprint(info.fingerprint)
            self.replies = WorkerReplies(self.root / REPLIES_FOLDER)
        else:
            self.stores = TenantStores(self.root, int(extra.get("ram_bytes", 0)))
            self.runner: JobRunner | None = None  # set by :meth:`attach`
            self._failed: dict[str, str] = {}
            self._invalid_blocks: set[int] = set()

    # Called in the scheduler.

    def _use_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Plan requests for the model with this fingerprint."""
        self.fingerprint = fingerprint
        self.planner = Planner(fingerprint.digest.hex())
        logger.info("ragcache: this model is %s", fingerprint)

    def _update_codec(self) -> None:
        """Use the codec of a store that was created after the start."""
        if self._codec is None and (codec := _codec_of(self.root)) is not None:
            self._codec = codec
            self._use_fingerprint(with_codec(ChunkKey(self.fingerprint, ()), codec).fingerprint)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        planned = PlannedRequest(
            request.request_id,
            request.kv_transfer_params,
            request.prompt_token_ids,
            request.cache_salt,
            request.lora_request.lora_name if request.lora_request is not None else None,
            bool(request.mm_features),
        )
        self._update_codec()
        before = len(self.planner.refused)
        count = self.planner.match(planned, num_computed_tokens)
        if len(self.planner.refused) > before:
            reason = self.planner.refused[planned.id]
            logger.warning("ragcache: nothing is loaded for %s: %s", planned.id, reason)
            self._report_refusal(planned.id, reason)
        return count, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        ids = blocks.get_block_ids()[0] if num_external_tokens else ()
        self.planner.allocate(request.request_id, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> _StepJobs:
        return _StepJobs(self.fingerprint, self.planner.take_jobs())

    def update_connector_output(self, connector_output: Any) -> None:
        if (failed := connector_output.kv_connector_worker_meta) is not None:
            self.planner.mark_failed(failed.requests)
            for request, reason in failed.requests.items():
                self._report_refusal(request, reason)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        reason = self.planner.finish(request.request_id)
        return False, None if reason is None else {"ragcache": refusal_reply(reason)}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def _report_refusal(self, request: str, reason: str) -> None:
        manifest = self.planner.manifest(request)
        if manifest is not None and manifest.ticket:
            try:
                self.replies.write_report(manifest.ticket, refusal_reply(reason))
            except OSError as error:  # it must not stop the scheduler
                logger.warning("ragcache: no reply can be written for %s: %s", request, error)

    # Called in the workers.

    def attach(self, model: Any) -> None:
        """Use the worker's model, whose KV cache is allocated.

        Raises ModelError if the model is not supported, and ConfigError if its KV heads cannot be
        divided among the tensor-parallel workers.
        """
        from ragcache.vllm.model import VllmModel

        tp = get_tp_group()
        heads = self._vllm_config.model_config.get_total_num_kv_heads()
        if heads % tp.world_size:
            raise ConfigError(
                f"{tp.world_size} tensor-parallel workers cannot share {heads} KV heads evenly: "
                "give a --tensor-parallel-size that divides them"
            )
        rank = TensorParallelRank(tp.rank_in_group, tp.world_size, _all_gather(tp))
        group = self._kv_cache_config.kv_cache_groups[0]
        driven = VllmModel(model, self._vllm_config, group)
        if rank.of > 1:
            driven.upload = lambda pairs: _LocalHeads(rank.heads(pairs))
        self.runner = JobRunner(driven, self.stores, rank)
        self._model = driven

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, _StepJobs)
        if step.jobs and self.runner is None:
            raise ConfigError(
                "vLLM was started without ragcache's worker class, which the connector needs: add "
                "--worker-cls ragcache.vllm.gpu.GPUWorker, or ragcache.vllm.cpu.CPUWorker"
            )
        for job in step.jobs:
            self._model.fingerprint = step.fingerprint
            self._run_job(job)

    def _run_job(self, job: LoadJob) -> None:
        """Run a job. If it fails, all blocks of the request are reported to vLLM as invalid.

        A prefill writes all rows of a layer, including those of cached blocks.
        """
        assert self.runner is not None
        try:
            with self._model.using_blocks(job.blocks):
                self.runner.run(job)
        except Exception as error:  # after any error, vLLM can compute the prompt itself
            if isinstance(error, RagCacheError):
                logger.warning("ragcache: %s is computed by vLLM: %s", job.request, error)
            else:
                logger.exception("ragcache: %s is computed by vLLM", job.request)
            self._failed[job.request] = str(error) or type(error).__name__
            self._invalid_blocks.update(blocks_before(job.stop, job.blocks, self.block_size))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to do: KV is loaded before the forward pass."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: KV is returned before the forward pass."""

    def wait_for_save(self) -> None:
        """Nothing to do."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._invalid_blocks = self._invalid_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> _FailedJobs | None:
        failed, self._failed = self._failed, {}
        return _FailedJobs(failed) if failed else None

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self.stores.close()


class _LocalHeads:
    """The KV of a rank's heads as an upload that is complete."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs

    def taken(self) -> list[tuple[Any, Any]]:
        return self.pairs

    def finish(self) -> None:
        pass


def _all_gather(group: Any) -> Any:
    def gather(mine: frozenset[bytes]) -> list[frozenset[bytes]]:
        import torch.distributed

        gathered: list[frozenset[bytes]] = [frozenset()] * group.world_size
        torch.distributed.all_gather_object(gathered, mine, group=group.cpu_group)
        return gathered

    return gather


def _codec_of(root: Path) -> str | None:
    """The store's codec; None if there is no store yet."""
    try:
        with DiskStore(root, readonly=True) as store:
            return Catalog(store).get_setting("codec") or "raw"
    except StoreError:
        return None


def _setup(config: Any, caches: Any) -> VllmSetup:
    """The parts of vLLM's configuration that :mod:`ragcache.vllm.support` checks."""
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    elsewhere = {
        "--tokenizer": model.tokenizer != model.model,
        "--revision": model.revision is not None,
        "--tokenizer-revision": model.tokenizer_revision not in (None, model.revision),
        "--hf-config-path": model.hf_config_path is not None,
        "--hf-overrides": bool(model.hf_overrides),
    }
    return VllmSetup(
        version=__version__,
        cache_dtype=config.cache_config.cache_dtype,
        kv_groups=len(caches.kv_cache_groups),
        mla=model.use_mla,
        windows=bool(model.get_sliding_window()) or bool(kinds - {"full_attention"}),
        pipeline=parallel.pipeline_parallel_size,
        context=parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size,
        lora=config.lora_config is not None,
        multimodal=model.is_multimodal_model,
        quantization=model.quantization,
        speculative=config.speculative_config is not None,
        load_format=str(config.load_config.load_format),
        elsewhere=tuple(option for option, given in elsewhere.items() if given),
    )
