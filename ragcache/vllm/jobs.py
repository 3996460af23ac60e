"""What a worker of vLLM does for a request before its forward: fuse a prompt, or keep a chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragcache.blend import Blender, blender
from ragcache.blend.base import Layout, positions
from ragcache.core.prefill import FusedPrefill, PrefillContext
from ragcache.core.report import make_report
from ragcache.engine.base import Prefiller
from ragcache.errors import ConfigError
from ragcache.planning.context import EncodingContext
from ragcache.planning.lookup import look_up
from ragcache.store.base import ChunkStore, Miss
from ragcache.store.disk.store import DiskStore
from ragcache.store.memory import MemoryStore
from ragcache.store.tenants import tenant_folder
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Prompt
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.planner import LoadJob

if TYPE_CHECKING:
    from torch import Tensor

#: What all ranks of a tensor-parallel group say, from what each of them says.
Agree = Callable[[frozenset[bytes]], Sequence[frozenset[bytes]]]


@dataclass(frozen=True, slots=True)
class TensorParallelRank:
    """A worker among those that share every layer's heads."""

    number: int = 0
    of: int = 1
    agree: Agree | None = None

    def heads(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """This worker's part of KV of all heads, each (kv_heads, n, head_dim)."""
        share = pairs[0][0].shape[0] // self.of if pairs else 0
        mine = slice(self.number * share, (self.number + 1) * share)
        return [(keys[mine], values[mine]) for keys, values in pairs]


class TenantStores:
    """The stores of tenants below ``root``, each opened when it is first asked for, to be read.

    ``ram_bytes``: of decoded KV held in front of each.
    """

    def __init__(self, root: Path, ram_bytes: int = 0) -> None:
        self.root, self.ram_bytes = root, ram_bytes
        self._open: dict[str, ChunkStore] = {}

    def of(self, tenant: str) -> ChunkStore:
        """Raises StoreError where there is none."""
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
    """Does jobs with ``model``, whose rows are the job's blocks while it is at one."""

    def __init__(
        self, model: Prefiller, stores: TenantStores, rank: TensorParallelRank | None = None
    ) -> None:
        self.model, self.stores, self.rank = model, stores, rank or TensorParallelRank()
        self.replies = WorkerReplies(stores.root / REPLIES_FOLDER)

    def run(self, job: LoadJob) -> None:
        """Do a job: then all rows of its prompt have their KV, and what was asked for is in the
        mailbox.

        Raises RagCacheError where that cannot be.
        """
        prompt = job.manifest.prompt(job.tokens)
        if job.manifest.task == "keep":
            self._keep(job.manifest, prompt)
        else:
            self._fuse(job.manifest, prompt)

    def _keep(self, manifest: Manifest, prompt: Prompt) -> None:
        import torch

        [kv] = self.model.encode(prompt.chunks, behind=prompt.prefix)
        keys, values = torch.stack(kv.keys), torch.stack(kv.values)
        self.replies.write_kv(manifest.ticket, self.rank.number, self.rank.of, keys, values)

    def _fuse(self, manifest: Manifest, prompt: Prompt) -> None:
        made = blender(manifest.mode)
        check_mode(made, self.rank.of)
        behind = prompt.prefix if manifest.behind is None else manifest.behind
        encoding = EncodingContext(manifest.compiled, behind, similar=_similar(manifest.compiled))
        store = self.stores.of(manifest.tenant)
        given = PrefillContext(self.model, store, encoding, manifest.tenant)
        if self.rank.of > 1:
            given = self._with_common_chunks(given, prompt, made)
        fusion = FusedPrefill(given, prompt, made)
        if manifest.ticket and self.rank.number == 0:
            report = make_report(fusion.fused, fusion.resolved, made, (), fusion.fallbacks)
            self.replies.write_report(manifest.ticket, {"report": asdict(report)})

    def _with_common_chunks(
        self, given: PrefillContext, prompt: Prompt, made: Blender
    ) -> PrefillContext:
        """The same with what every rank could read, in memory: if one found out in the middle of a
        layer what the others do not, they would wait for it for ever."""
        _check_no_selection_by_kv(
            made, prompt, self.model.spec.layers
        )  # here all ranks still agree
        found = look_up(
            prompt,
            made,
            given.store,
            self.model.fingerprint,
            encoding=given.encoding,
            tenant=given.tenant,
        )
        read = {part.key: given.store.get(part.key) for part in found.stored}
        mine = frozenset(key.digest for key, kv in read.items() if not isinstance(kv, Miss))
        assert self.rank.agree is not None
        everywhere = frozenset.intersection(*self.rank.agree(mine))
        held = MemoryStore()
        for key, kv in read.items():
            if key.digest in everywhere and not isinstance(kv, Miss):
                held.put(key, kv)
        return PrefillContext(given.engine, held, given.encoding, given.tenant)


def check_mode(made: Blender, ranks: int = 1) -> None:
    """Raise ConfigError for a mode that vLLM cannot go on from."""
    if made.placement == "overlapping":
        raise ConfigError(
            f"mode {made.mode} lets chunks share positions, which vLLM's decoding knows nothing "
            "of. Use another, or the embedded engine."
        )
    if ranks > 1 and made.behind == "variant":
        raise ConfigError(
            f"mode {made.mode} looks at attention, of which each of {ranks} tensor-parallel "
            "workers sees a part. Use fused, epic, random or reuse, or replicas of one worker."
        )


def _check_no_selection_by_kv(made: Blender, prompt: Prompt, layers: int) -> None:
    """Raise ConfigError where a mode looks at heads that other ranks have."""
    whole = Layout(prompt, (True,) * len(prompt.chunks), True, positions(prompt, made.placement))
    selector = made.selector(whole, layers)
    looks = selector.probe or selector.attend or any(map(selector.compares, range(layers)))
    if looks:
        raise ConfigError(
            f"mode {made.mode} looks at KV or attention, of which each tensor-parallel worker has "
            "a part. Use fused, epic, random or reuse, or replicas of one worker."
        )


def _similar(encoding: str) -> int:
    """Of compile mode enriched(n), n."""
    return int(encoding.partition("(")[2].rstrip(")")) if encoding.startswith("enriched(") else 0


def refusal_reply(reason: str) -> dict[str, Any]:
    """The worker_reply that says why nothing was done."""
    return {"refused": reason}
