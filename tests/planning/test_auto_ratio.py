"""The automatic ratio from end to end, with made-up speeds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ragcache.blend import blender
from ragcache.cli.render.answers import explanation
from ragcache.errors import ConfigError
from ragcache.planning import profile
from ragcache.planning.cost_model import Speeds
from ragcache.rag import RagCache
from ragcache.settings import Ratio
from ragcache.store import StoredChunk
from ragcache.types import Plan, Report
from tests import scene

QUESTION = "Where does Mira Holt live?"
LONG = "Mira Holt plays the cello by the sea, and her father built small boats in Oslo. " * 3
SHORT = "No more."
LAYERS = 4


def use(cache: RagCache, row_s: float, read_s: float, place_s: float = 0.0) -> None:
    """Let this be the machine from now on."""
    speeds = Speeds(0.0, row_s, 0.0, place_s, read_s, 0.0, 0.0)
    cache.catalog.put_setting(cache.profile.setting, speeds.as_json())
    cache.profile._known = None


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path, ratio="auto") as cache:
        cache.add(scene.DOCUMENTS)
        use(cache, 1.0, 0.0)
        cache.ask(QUESTION, chunks=[LONG, SHORT])  # not stored yet, now they are
        yield cache


def planned(report: Report) -> Plan:
    assert report.plan is not None
    return report.plan


def test_a_fast_store_leaves_the_ratio_at_its_floor(cache: RagCache) -> None:
    report = cache.ask(QUESTION, chunks=[LONG, SHORT]).report
    assert report.parameters["recompute_ratio"] == planned(report).ratio == 0.15
    assert not any(chunk.cheaper for chunk in report.chunks)
    fixed = cache.ask(QUESTION, chunks=[LONG, SHORT], ratio=0.15).report
    assert fixed.plan is None and fixed.chunks == report.chunks


def test_a_prediction_that_is_far_off_says_what_to_do(cache: RagCache) -> None:
    """This machine is made up to take seconds for a row, and takes milliseconds."""
    *_, last = explanation(cache.ask(QUESTION, chunks=[LONG, SHORT]))
    assert last.startswith("- These differ widely: `ragcache profile` measures again")


def test_a_slow_store_raises_the_ratio(cache: RagCache) -> None:
    length = len(cache.engine.template.chunk(LONG))
    question = cache.ask(QUESTION, chunks=[LONG]).report.question_tokens
    use(cache, 1.0, (question + 0.5 * length) / (2 * LAYERS))  # the prefix, and the chunk
    report = cache.ask(QUESTION, chunks=[LONG], mode="fused:attention=0").report
    plan = planned(report)
    assert plan.ratio == pytest.approx(0.5) and plan.load_s == pytest.approx(plan.compute_s)
    assert report.recomputed_tokens == int(plan.ratio * length)
    assert report.parameters["recompute_ratio"] == plan.ratio
    assert "the ratio rises to 0.50" in plan.sentences[-1]


def test_a_short_chunk_is_computed_and_no_miss(cache: RagCache) -> None:
    use(cache, 1.0, 5.0)
    before = cache.store.stats()
    answer = cache.ask(QUESTION, chunks=[LONG, SHORT])
    report, after = answer.report, cache.store.stats()
    long, short = report.chunks
    assert (long.cheaper, short.cheaper) == (False, True)
    assert short.miss is None and not report.fallbacks
    assert (short.recomputed, short.charged) == (short.tokens, 1.0)
    assert report.reused_tokens + report.recomputed_tokens == long.tokens
    assert report.bytes_loaded == cache.engine.spec.chunk_bytes(report.prefix_tokens + long.tokens)
    assert planned(report).recompute == (1,)
    assert (after.chunks, after.misses) == (before.chunks, before.misses)
    assert "1 of 2 stored chunks (number 2; " in planned(report).sentences[0]


def test_computed_altogether_it_is_full_prefill(cache: RagCache) -> None:
    use(cache, 1e-6, 1.0)
    for chunks in ([LONG, SHORT], [SHORT, LONG, SHORT], None):
        stream, full = (cache.stream(QUESTION, chunks=chunks, mode=m) for m in (None, "full"))
        report = stream.answer.report
        assert all(chunk.cheaper for chunk in report.chunks) and report.reused_tokens == 0
        assert "this is full prefill, and exact" in planned(report).sentences[-1]
        assert stream.answer.tokens == full.answer.tokens
        torch.testing.assert_close(stream.first_logits, full.first_logits, atol=1e-4, rtol=1e-4)


def test_what_is_asked_for_wins(cache: RagCache) -> None:
    use(cache, 1.0, 100.0)

    def ratio(mode: str | None = None, ratio: Ratio | None = None) -> tuple[bool, float]:
        report = cache.ask(QUESTION, mode=mode, ratio=ratio).report
        return report.plan is not None, report.parameters["recompute_ratio"]

    assert ratio("fused:recompute_ratio=0.3") == (False, 0.3)
    assert ratio("fused:recompute_ratio=0.3", "auto") == (False, 0.3)
    assert ratio("cacheblend", 0.3) == ratio(None, 0.3) == (False, 0.3)
    assert ratio("cacheblend")[0] and ratio("prophet+full_layers=1", "auto")[0] and ratio()[0]
    assert cache.ask(QUESTION, mode=blender("fused")).report.plan is None
    with pytest.raises(ConfigError, match="cannot be read as float"):
        cache.ask(QUESTION, ratio="fast")  # type: ignore[arg-type]


def test_a_methods_own_ratio_is_its_floor(cache: RagCache) -> None:
    assert planned(cache.ask(QUESTION, mode="prophet+full_layers=1").report).ratio == 0.2
    assert planned(cache.ask(QUESTION, mode="cacheblend").report).ratio == 0.15


@pytest.mark.parametrize("mode", ["full", "prefix", "reuse", "epic", "cachecraft", "ape"])
def test_methods_without_a_ratio_measure_nothing(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "measure_speeds", None)  # to call it would fail
    with scene.small(tmp_path, ratio="auto", mode=mode) as cache:
        cache.add(scene.DOCUMENTS)
        assert cache.ask(QUESTION).report.plan is None


def test_it_is_measured_at_the_first_need(tmp_path: Path) -> None:
    with scene.small(tmp_path, ratio="auto") as cache:
        assert cache.ask(QUESTION, chunks=[LONG]).report.plan is None  # nothing is stored yet
        assert cache.profile.recorded() is None
        plan = planned(cache.ask(QUESTION, chunks=[LONG]).report)
        speeds = cache.profile.recorded()
        assert speeds is not None and speeds.measured in plan.sentences[0]
        assert 0.15 <= plan.ratio <= 1 and plan.prefill_s > 0


def test_a_store_that_is_slow_is_found_out(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = cache.store.layers

    def slowly(
        chunks: Sequence[StoredChunk], layer: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        time.sleep(0.02 * len(chunks))
        return read(chunks, layer)

    monkeypatch.setattr(cache.store, "layers", slowly)
    speeds = cache.speeds(anew=True)
    assert speeds is not None and speeds.load_s(LAYERS, 0) + 1e4 * speeds.byte_s > 0.03
    report = cache.ask(QUESTION, chunks=[LONG, SHORT]).report
    assert report.chunks[1].cheaper and (report.chunks[0].cheaper or planned(report).ratio > 0.15)


def test_a_record_that_rots_is_planned_around(cache: RagCache) -> None:
    want = cache.ask(QUESTION, mode="full")
    key = cache.indexing.keys("holt")[0]
    with cache.store.tables.write() as txn:
        name = key.digest + (2).to_bytes(2, "big")
        raw = bytearray(txn.get("layers", name) or b"")
        raw[17] ^= 1
        txn.put("layers", name, bytes(raw))
    report = cache.ask(QUESTION, chunks=want.passages).report
    number = [p.chunk.id for p in want.passages].index("holt#0")
    assert report.chunks[number].miss == "corrupt" and not report.chunks[number].cheaper
    assert "1 of 2 chunks are not stored: computed." in planned(report).sentences
