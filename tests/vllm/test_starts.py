"""vLLM with other options, or on a damaged store: one vLLM for each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.epic import Epic
from ragcache.blend.fused import Fused
from ragcache.blend.random import Random
from ragcache.blend.reuse import Reuse
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError
from ragcache.store.base import Miss
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.types import Prompt
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies, new_ticket
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import cache_salt
from tests import models
from tests.vllm import scene
from tests.vllm.scene import Request, Scene
from tests.vllm.test_trouble import MODES, check_batch

pytestmark = pytest.mark.vllm


@pytest.fixture
def injured(tiny_model_dir: Path, tiny: Scene, tmp_path: Path) -> Scene:
    """The scene with a store of its own, to be damaged."""
    return Scene.of(tiny.engine, tmp_path / "store")


def damage(path: Path, key: ChunkKey, layer: int, *, drop: bool) -> None:
    """Take a layer's record away, or change a byte of it."""
    name = key.digest + layer.to_bytes(2, "big")
    with DiskStore(path) as store, store.tables.write() as txn:
        raw = txn.get("layers", name)
        assert raw is not None
        txn.delete("layers", name)
        if not drop:
            txn.put("layers", name, bytes([raw[0] ^ 1]) + bytes(raw[1:]))


@pytest.mark.parametrize("drop", [True, False], ids=["missing", "changed"])
def test_a_layer_that_is_not_whole(injured: Scene, tiny_model_dir: Path, drop: bool) -> None:
    """The chunk is dropped in the middle of the fusion, and computed."""
    damage(injured.path, injured.keys[2], 5, drop=drop)
    assert injured.held.delete(injured.keys[2])
    with scene.started(tiny_model_dir, injured.path) as llm:
        for made in MODES:
            [said] = injured.ask(llm, [Request.fused(injured.prompt, made, injured)])
            injured.check(said, injured.prompt, made)
            assert said.report is not None
            assert any("chunk 2 was recomputed" in s for s in said.report["fallbacks"])


def test_a_store_that_is_made_after_the_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its codec is not known before, and is in every chunk's key."""
    engine = TransformersEngine.load(tiny_model_dir, dtype="float32", codec="bfloat16")
    with scene.started(tiny_model_dir, tmp_path / "store") as llm:
        with DiskStore(tmp_path / "store") as store:
            Catalog(store).put_setting("codec", "bfloat16")
        made = Scene.of(engine, tmp_path / "store")
        with DiskStore(made.path) as store:
            for key in made.keys:  # as it is read, rounded
                assert not isinstance(kv := store.get(key), Miss)
                made.held.put(key, kv)
        [said] = made.ask(llm, [Request.fused(made.prompt, Fused(0.3), made)])
        made.check(said, made.prompt, Fused(0.3))
        assert said.report is not None and said.report["reused_tokens"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_chunked_prefill": True},
        {"enforce_eager": False},
    ],
    ids=["chunked prefill", "compiled"],
)
def test_other_ways_to_start(tiny: Scene, tiny_model_dir: Path, changes: dict[str, Any]) -> None:
    given = {"max_model_len": 256, **changes}
    with scene.started(tiny_model_dir, tiny.path, **given) as llm:
        check_batch(tiny, llm, scene.TOKENS, copies=2)


def test_preemption(tiny: Scene, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a few requests at a time, which grow: some lose their blocks and are fused again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, count = Scheduler._preempt_request, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.append(args)
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    few = {"num_gpu_blocks_override": 14, "max_num_seqs": 8, "max_model_len": 256}
    with scene.started(tiny_model_dir, tiny.path, **few) as llm:
        check_batch(tiny, llm, 64, copies=2, ignore_eos=True)
    assert count


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"enable_lora": True}, "adapters change the KV"),
        ({"kv_cache_dtype": "fp8"}, "its KV cache is fp8"),
    ],
)
def test_a_setup_that_would_be_wrong_does_not_start(
    tiny: Scene, tiny_model_dir: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why), scene.started(tiny_model_dir, tiny.path, **changes):
        pass


def test_a_sliding_window_does_not_start(tiny: Scene, tmp_path: Path) -> None:
    made = models.model("mistral", head_dim=32, hidden_size=128, sliding_window=64)
    made.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="sliding window"):
        with scene.started(tmp_path, tiny.path):
            pass


def test_tensor_parallel(
    tiny: Scene, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers with half of the heads each: the same answers, the same KV handed back."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    blind = [Reuse(), Fused(0.3), Epic(3), Random(0.3), Fused(1.0)]
    key = tiny.keys[1]
    kept = Manifest.keep(key.tokens, key.context, key.fingerprint.digest, new_ticket())
    requests = [Request.fused(tiny.prompt, made, tiny) for made in blind]
    requests += [
        Request(Prompt.of(key.context, (key.tokens,), ()), kept, salt=cache_salt(kept)),
        Request.fused(tiny.prompt, CacheBlend(0.3), tiny),
    ]
    with scene.started(tiny_model_dir, tiny.path, tensor_parallel_size=2) as llm:
        *said, whole, looks = tiny.ask(llm, requests, 120)
    for one, made in zip(said, blind, strict=True):
        tiny.check(one, tiny.prompt, made)
    assert whole.refused is None
    keys, _ = WorkerReplies(tiny.path / REPLIES_FOLDER).take_kv(kept.ticket)
    [want] = tiny.engine.encode([key.tokens], context=key.context)
    torch.testing.assert_close(keys, torch.stack(want.keys), rtol=1e-4, atol=1e-4)
    assert "tensor-parallel worker has a part" in (looks.refused or "")
