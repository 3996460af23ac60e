"""The KV connector: what vLLM's scheduler and workers call.

Started with ``--kv-transfer-config '{"kv_connector": "RagCacheConnector",
"kv_connector_module_path": "ragcache.vllm.connector", "kv_role": "kv_both",
"kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "FOLDER"}}'``
and ``--worker-cls ragcache.vllm.cpu.CPUWorker`` (or ``ragcache.vllm.gpu.GPUWorker``).

Everything is done before a forward, between two steps: vLLM's own forward, with its graphs and its
compiled code, is not touched.
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
from ragcache.vllm.handoff import FOLDER, WorkerReplies
from ragcache.vllm.jobs import JobRunner, Rank, Stores, refusal
from ragcache.vllm.planner import LoadJob, PlannedRequest, Planner, merged
from ragcache.vllm.slots import touched
from ragcache.vllm.support import Setup, check

logger = logging.getLogger("vllm.ragcache")


@dataclass
class Jobs(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where this is typed
    """From the scheduler to the workers, for one step."""

    fingerprint: Fingerprint  # of the model: one process has read its weights for all
    jobs: list[LoadJob] = field(default_factory=list)


@dataclass
class Failed(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Back from a worker: what it could not do, by request, and why."""

    requests: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Failed:
        assert isinstance(other, Failed)
        return Failed(merged((self.requests, other.requests)))


class RagCacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One of these is in the scheduler, and one in every worker."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check(_setup(vllm_config, kv_cache_config))
        extra = self._kv_transfer_config.kv_connector_extra_config
        if unknown := set(extra) - {"store", "codec", "ram_bytes"}:
            raise ConfigError(
                f"kv_connector_extra_config has {', '.join(sorted(unknown))}: it takes store, the "
                "folder of the store, codec and ram_bytes"
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
            own = ModelInfo.of(model.model, dtype, self._codec or "raw").fingerprint
            self._is(own)
            self.mailbox = WorkerReplies(self.root / FOLDER)
        else:
            self.stores = Stores(self.root, int(extra.get("ram_bytes", 0)))
            self.workshop: JobRunner | None = None  # until the worker has brought its model
            self._failed: dict[str, str] = {}
            self._bad: set[int] = set()

    # The scheduler's side.

    def _is(self, own: Fingerprint) -> None:
        """Plan for the model with this fingerprint."""
        self.fingerprint = own
        self.planner = Planner(own.digest.hex())
        logger.info("ragcache: this model is %s", own)

    def _take_codec(self) -> None:
        """Take the codec of a store that was made since the start."""
        if self._codec is None and (codec := _codec_of(self.root)) is not None:
            self._codec = codec
            self._is(with_codec(ChunkKey(self.fingerprint, ()), codec).fingerprint)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        asked = PlannedRequest(
            request.request_id,
            request.kv_transfer_params,
            request.prompt_token_ids,
            request.cache_salt,
            request.lora_request.lora_name if request.lora_request is not None else None,
            bool(request.mm_features),
        )
        self._take_codec()
        before = len(self.planner.refused)
        count = self.planner.match(asked, num_computed_tokens)
        if len(self.planner.refused) > before:
            reason = self.planner.refused[asked.id]
            logger.warning("ragcache: nothing is loaded for %s: %s", asked.id, reason)
            self._tell(asked.id, reason)
        return count, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        ids = blocks.get_block_ids()[0] if num_external_tokens else ()
        self.planner.allocated(request.request_id, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        return Jobs(self.fingerprint, self.planner.due())

    def update_connector_output(self, connector_output: Any) -> None:
        if (failed := connector_output.kv_connector_worker_meta) is not None:
            self.planner.failed(failed.requests)
            for request, reason in failed.requests.items():
                self._tell(request, reason)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        reason = self.planner.finished(request.request_id)
        return False, None if reason is None else {"ragcache": refusal(reason)}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def _tell(self, request: str, reason: str) -> None:
        manifest = self.planner.manifest(request)
        if manifest is not None and manifest.ticket:
            try:
                self.mailbox.post(manifest.ticket, refusal(reason))
            except OSError as error:  # it must not end the scheduler
                logger.warning("ragcache: %s cannot be told: %s", request, error)

    # The workers' side.

    def attach(self, model: Any) -> None:
        """Take the worker's model, once its KV is allocated. Raises ModelError where it cannot be
        driven."""
        from ragcache.vllm.model import VllmModel

        tp = get_tp_group()
        heads = self._vllm_config.model_config.get_total_num_kv_heads()
        if heads % tp.world_size:
            raise ConfigError(
                f"{tp.world_size} tensor-parallel workers cannot share {heads} KV heads evenly: "
                "give a --tensor-parallel-size that divides them"
            )
        rank = Rank(tp.rank_in_group, tp.world_size, _agreement(tp))
        group = self._kv_cache_config.kv_cache_groups[0]
        driven = VllmModel(model, self._vllm_config, group)
        if rank.of > 1:
            driven.upload = lambda pairs: _Mine(rank.heads(pairs))
        self.workshop = JobRunner(driven, self.stores, rank)
        self._driven = driven

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        given = self._get_connector_metadata()
        assert isinstance(given, Jobs)
        if given.jobs and self.workshop is None:
            raise ConfigError(
                "vLLM was started without ragcache's worker, which hands its model over: add "
                "--worker-cls ragcache.vllm.gpu.GPUWorker, or ragcache.vllm.cpu.CPUWorker"
            )
        for job in given.jobs:
            self._driven.fingerprint = given.fingerprint
            self._do(job)

    def _do(self, job: LoadJob) -> None:
        """Do a job; where it fails, vLLM is told which blocks are not to be trusted: all of them.
        A prefill writes every row of a layer, those of cached blocks too."""
        assert self.workshop is not None
        try:
            with self._driven.over(job.blocks):
                self.workshop.do(job)
        except Exception as error:  # whatever it was, vLLM can compute the prompt itself
            if isinstance(error, RagCacheError):
                logger.warning("ragcache: %s is left to vLLM: %s", job.request, error)
            else:
                logger.exception("ragcache: %s is left to vLLM", job.request)
            self._failed[job.request] = str(error) or type(error).__name__
            self._bad.update(touched(job.stop, job.blocks, self.block_size))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was there before the forward."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """KV to be kept was handed back before the forward."""

    def wait_for_save(self) -> None:
        """As above."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad = self._bad, set()
        return bad

    def build_connector_worker_meta(self) -> Failed | None:
        failed, self._failed = self._failed, {}
        return Failed(failed) if failed else None

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self.stores.close()


class _Mine:
    """A rank's heads, which are there already."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs

    def taken(self) -> list[tuple[Any, Any]]:
        return self.pairs

    def finish(self) -> None:
        pass


def _agreement(group: Any) -> Any:
    def agree(mine: frozenset[bytes]) -> list[frozenset[bytes]]:
        import torch.distributed

        said: list[frozenset[bytes]] = [frozenset()] * group.world_size
        torch.distributed.all_gather_object(said, mine, group=group.cpu_group)
        return said

    return agree


def _codec_of(root: Path) -> str | None:
    """How the store's KV is stored; None where there is no store yet."""
    try:
        with DiskStore(root, readonly=True) as store:
            return Catalog(store).get_setting("codec") or "raw"
    except StoreError:
        return None


def _setup(config: Any, caches: Any) -> Setup:
    """What is to be known of a vLLM as it was started."""
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
    return Setup(
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
