"""The jobs of a vLLM worker before a forward pass: fuse a prompt, or return a chunk's KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragcache.blend import Blender, blender
from ragcache.blend.base import Layout, positions
from ragcache.core.prefill import PrefillContext, prefill
from ragcache.core.report import make_report
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Prefiller
from ragcache.errors import ConfigError
from ragcache.store.base import ChunkStore, Miss
from ragcache.store.disk.store import DiskStore
from ragcache.store.memory import MemoryStore
from ragcache.store.tenants import tenant_folder
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Prompt, Sampling
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.planner import LoadJob

if TYPE_CHECKING:
    from torch import Tensor

#: Gathers a set from each rank of a tensor-parallel group.
_AllGather = Callable[[frozenset[bytes]], Sequence[frozenset[bytes]]]


@dataclass(frozen=True, slots=True)
class TensorParallelRank:
    """A worker's place among the tensor-parallel workers, which divide the heads of every layer."""

    number: int = 0
    of: int = 1
    all_gather: _AllGather | None = None

    def heads(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """This worker's heads of KV pairs, (kv_heads, n, head_dim) each."""
        share = pairs[0][0].shape[0] // self.of if pairs else 0
        mine = slice(self.number * share, (self.number + 1) * share)
        return [(keys[mine], values[mine]) for keys, values in pairs]


class TenantStores:
    """The tenants' stores in ``root``, opened read-only on first use.

    ``ram_bytes`` is the size of the RAM tier of each, for decoded KV.
    """

    def __init__(self, root: Path, ram_bytes: int = 0) -> None:
        self.root, self.ram_bytes = root, ram_bytes
        self._open: dict[str, ChunkStore] = {}

    def of(self, tenant: str) -> ChunkStore:
        """The store of a tenant. Raises StoreError if there is none."""
        if tenant not in self._open:
            store: ChunkStore = DiskStore(tenant_folder(self.root, tenant), readonly=True)
            if self.ram_bytes:
                store = RamTier(store, self.ram_bytes)
            self._open[tenant] = store
        return self._open[tenant]

    def close(self) -> None:
        for store in self._open.values():
            store.close()
        self._open.clear()


class JobRunner:
    """Runs jobs with ``model``, which must use the job's blocks during :meth:`run`."""

    def __init__(
        self, model: Prefiller, stores: TenantStores, rank: TensorParallelRank | None = None
    ) -> None:
        self.model, self.stores, self.rank = model, stores, rank or TensorParallelRank()
        self.replies = WorkerReplies(stores.root / REPLIES_FOLDER)

    def run(self, job: LoadJob) -> None:
        """Run a job: compute or place the KV of all rows of its prompt, and write the reply.

        Raises RagCacheError if that fails.
        """
        prompt = job.manifest.prompt(job.tokens)
        if job.manifest.task == "keep":
            self._keep(job.manifest, prompt)
        else:
            self._fuse(job.manifest, prompt)

    def _keep(self, manifest: Manifest, prompt: Prompt) -> None:
        import torch

        [kv] = self.model.encode(prompt.chunks, context=prompt.prefix)
        keys, values = torch.stack(kv.keys), torch.stack(kv.values)
        self.replies.write_kv(manifest.ticket, self.rank.number, self.rank.of, keys, values)

    def _fuse(self, manifest: Manifest, prompt: Prompt) -> None:
        mode = blender(manifest.mode)
        check_mode(mode, self.rank.of)
        if self.rank.of > 1:  # each rank sees a part of the attention weights
            mode = mode.without_attention
        store = self.stores.of(manifest.tenant)
        context = PrefillContext(self.model, store, manifest.encoding(prompt), manifest.tenant)
        if self.rank.of > 1:
            context = self._with_common_chunks(context, prompt, mode)
        done = prefill(context, PromptRequest(prompt, mode, Sampling(max_tokens=1)))
        if manifest.ticket and self.rank.number == 0:
            self.replies.write_report(manifest.ticket, {"report": asdict(make_report(done))})

    def _with_common_chunks(
        self, context: PrefillContext, prompt: Prompt, mode: Blender
    ) -> PrefillContext:
        """The context with only those chunks, in memory, that every rank could read.

        Otherwise a rank that cannot read a chunk would deviate in the middle of a layer, and the
        others would wait for it forever.
        """
        # An error must be raised while all ranks still agree.
        _check_no_selection_by_kv(mode, prompt, self.model.spec.layers)
        found = context.look_up(PromptRequest(prompt, mode))
        read = {part.key: context.store.get(part.key) for part in found.stored}
        mine = frozenset(key.digest for key, kv in read.items() if not isinstance(kv, Miss))
        assert self.rank.all_gather is not None
        everywhere = frozenset.intersection(*self.rank.all_gather(mine))
        common = MemoryStore()
        for key, kv in read.items():
            if key.digest in everywhere and not isinstance(kv, Miss):
                common.put(key, kv)
        return PrefillContext(context.engine, common, context.encoding, context.tenant)


def check_mode(mode: Blender, ranks: int = 1) -> None:
    """Raise ConfigError for a mode that vLLM cannot decode after."""
    if mode.placement == "overlapping":
        raise ConfigError(
            f"mode {mode.mode} lets chunks share positions, which vLLM's decoding does not "
            "support. Use another mode, or the embedded engine."
        )
    if ranks > 1 and mode.reuses == "variant":
        raise ConfigError(
            f"mode {mode.mode} uses attention weights, of which each of {ranks} tensor-parallel "
            "workers sees a part. Use fused, epic, random or reuse, or replicas of one worker."
        )


def _check_no_selection_by_kv(mode: Blender, prompt: Prompt, layers: int) -> None:
    """Raise ConfigError for a mode that needs the heads of other ranks."""
    if not prompt.chunks:
        return
    loaded = (True,) * len(prompt.chunks)
    layout = Layout(prompt, loaded, len(prompt.lead), positions(prompt, mode.placement))
    selector = mode.selector(layout, layers)
    needs_heads = selector.probe or selector.attend or any(map(selector.compares, range(layers)))
    if needs_heads:
        raise ConfigError(
            f"mode {mode.mode} uses KV or attention weights, of which each tensor-parallel worker "
            "has a part. Use fused, epic, random or reuse, or replicas of one worker."
        )


def refusal_reply(reason: str) -> dict[str, Any]:
    """The reply that says why nothing was done."""
    return {"refused": reason}
