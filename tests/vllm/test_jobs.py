"""A worker's jobs for prompts of any shape, with the embedded engine in place of vLLM's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from ragcache.blend import Blender, blender, written
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.epic import Epic
from ragcache.blend.fused import Fused
from ragcache.blend.prefix import Prefix
from ragcache.blend.reuse import Reuse
from ragcache.core.prefill import PrefillContext, prefill
from ragcache.core.report import make_report
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Prefilled
from ragcache.errors import ConfigError
from ragcache.store.memory import MemoryStore
from ragcache.types import Prompt
from ragcache.vllm.handoff import new_ticket
from ragcache.vllm.jobs import JobRunner, TenantStores, TensorParallelRank
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.planner import LoadJob
from tests.vllm.shapes import SHAPES, Shapes

MODES = [Reuse(), Fused(0.3), CacheBlend(0.3), Epic(3), Prefix()]


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return Shapes.make()


@pytest.fixture(scope="module")
def stores(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> TenantStores:
    return TenantStores(shapes.filled(tmp_path_factory.mktemp("worker") / "store"))


def job(shapes: Shapes, prompt: Prompt, mode: str) -> LoadJob:
    how, digest = shapes.encoding, shapes.engine.fingerprint.digest
    made = Manifest.fuse(prompt, mode, digest, encoding=how, ticket=new_ticket())
    return LoadJob("r", made, prompt.tokens, 0, len(prompt) - 1, ())


def ran(runner: JobRunner, made: LoadJob, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The report of a job, and the logits of its last row."""
    seen: list[Prefilled] = []
    forward = runner.model.prefill

    def prefills(*args: Any, **options: Any) -> Prefilled:
        seen.append(forward(*args, **options))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "prefill", prefills)
        runner.run(made)
    reply = runner.replies.take_report(made.manifest.ticket)
    assert reply is not None
    return reply["report"], seen[-1].logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_job_fuses_as_the_embedded_engine_does(
    shapes: Shapes,
    stores: TenantStores,
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    mode: Blender,
) -> None:
    prompt, held = shapes.prompts[shape], MemoryStore()
    shapes.fill(held)
    made = job(shapes, prompt, written(mode))
    report, logits = ran(JobRunner(shapes.engine, stores), made, monkeypatch)
    done = prefill(
        PrefillContext(shapes.engine, held, shapes.encoding), PromptRequest(prompt, mode)
    )
    torch.testing.assert_close(logits, done.fused.prefilled.logits, rtol=1e-5, atol=1e-5)
    expected = asdict(make_report(done))
    for name in ("prefix_tokens", "question_tokens", "reused_tokens", "recomputed_tokens"):
        assert report[name] == expected[name]
    assert tuple(report["computed"]) == expected["computed"]
    if mode.reuses == "encoded":
        assert all(chunk["miss"] is None for chunk in report["chunks"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["fused:recompute_ratio=1", "epic:first_tokens=64"])
def test_a_job_that_recomputes_everything_equals_full_prefill(
    shapes: Shapes, stores: TenantStores, monkeypatch: pytest.MonkeyPatch, shape: str, mode: str
) -> None:
    prompt = shapes.prompts[shape]
    made = job(shapes, prompt, mode)
    _, logits = ran(JobRunner(shapes.engine, stores), made, monkeypatch)
    torch.testing.assert_close(
        logits, shapes.engine.prefill(prompt.tokens).logits, rtol=1e-4, atol=1e-4
    )


def test_the_texts_before_the_first_chunk_are_loaded(
    shapes: Shapes, stores: TenantStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = shapes.prompts["several texts first"]
    report, _ = ran(JobRunner(shapes.engine, stores), job(shapes, prompt, "reuse"), monkeypatch)
    fresh = [row for row, layers in enumerate(report["computed"]) if layers]
    assert fresh == list(range(prompt.question_start, len(prompt)))


def test_without_a_context_chunks_are_keyed_by_the_tokens_before_the_first(
    shapes: Shapes, stores: TenantStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = shapes.prompts["chunk first"].parts[0]
    question = shapes.prompts["chunk first"].parts[-1]
    prompt = Prompt.of(shapes.encoding.context, [chunk.tokens], question.tokens)
    made = job(shapes, prompt, "epic")
    made = replace(made, manifest=replace(made.manifest, behind=None))
    report, _ = ran(JobRunner(shapes.engine, stores), made, monkeypatch)
    assert [chunk["miss"] for chunk in report["chunks"]] == [None]
    assert report["recomputed_tokens"] == 0  # exact where it stands


def rank(absent: frozenset[bytes] = frozenset()) -> TensorParallelRank:
    """One of two ranks; the other one cannot read the keys in ``absent``."""

    def gather(mine: frozenset[bytes]) -> Sequence[frozenset[bytes]]:
        return [mine, mine - absent]

    return TensorParallelRank(0, 2, gather)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_load_what_all_can_read(
    shapes: Shapes, stores: TenantStores, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    prompt = shapes.prompts[shape]
    made = job(shapes, prompt, "reuse")
    alone, logits = ran(JobRunner(shapes.engine, stores), made, monkeypatch)
    both, same = ran(JobRunner(shapes.engine, stores, rank()), made, monkeypatch)
    assert (both["reused_tokens"], both["computed"]) == (alone["reused_tokens"], alone["computed"])
    torch.testing.assert_close(same, logits, rtol=1e-5, atol=1e-5)
    if prompt.chunks:
        part = next(part for part in prompt.parts if part.is_chunk)
        key = shapes.encoding.key(shapes.engine.fingerprint, part.stored or part.tokens)
        lacking = JobRunner(shapes.engine, stores, rank(frozenset({key.digest})))
        report, _ = ran(lacking, made, monkeypatch)
        assert report["chunks"][0]["miss"] == "absent"


def test_ranks_refuse_a_mode_that_compares_kv(shapes: Shapes, stores: TenantStores) -> None:
    runner = JobRunner(shapes.engine, stores, rank())
    for mode, why in (("cacheblend", "uses KV or attention weights"), ("ape", "share positions")):
        with pytest.raises(ConfigError, match=why):
            runner.run(job(shapes, shapes.prompts["text between chunks"], mode))
    with pytest.raises(ConfigError, match="each of 2 tensor-parallel workers sees a part"):
        runner.run(job(shapes, shapes.prompts["chunk first"], written(blender("cachecraft"))))


def test_a_job_returns_the_kv_of_a_chunk(shapes: Shapes, stores: TenantStores) -> None:
    chunk, context = shapes.prompts["chunk first"].chunks[0], shapes.encoding.context
    for behind in ((), context):
        made = Manifest.keep(chunk, behind, shapes.engine.fingerprint.digest, new_ticket())
        runner = JobRunner(shapes.engine, stores)
        runner.run(LoadJob("r", made, behind + chunk, 0, len(chunk), ()))
        keys, values = runner.replies.take_kv(made.ticket)
        [expected] = shapes.engine.encode([chunk], context=behind)
        torch.testing.assert_close(keys, torch.stack(expected.keys))
        torch.testing.assert_close(values, torch.stack(expected.values))
