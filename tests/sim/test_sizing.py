"""The calculator against sums by hand, and routing against what must hold of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragcache.errors import ConfigError, ModelError
from ragcache.sim.routing import POLICIES, simulate_routing
from ragcache.sim.sizing import (
    MODEL_SHAPES,
    HardwarePrices,
    break_even_bandwidth,
    estimate_corpus,
    model_shape,
    parse_bandwidth,
)
from ragcache.sim.trace import zipf_trace
from ragcache.store.format.codecs import expected_bytes
from tests import models, scene
from tests.cli.test_commands import Run, run

__all__ = ["run"]  # a fixture


def test_llama_by_hand() -> None:
    model = MODEL_SHAPES["llama-3.1-8b"]
    assert expected_bytes("raw", model.spec, 1) == 2 * 32 * 8 * 128 * 2 == 131_072
    assert expected_bytes("int8", model.spec, 256) == 32 * (4 + 2 * 8 * 256 * (128 + 2))
    assert expected_bytes("kvtc16", model.spec, 256) == 256 * 131_072 / 16
    prices = HardwarePrices(flops=4e14, gpu_hour=3.6, gb_month=0.02, link=1e9)
    one = estimate_corpus(model, 1000, prices, tokens=256, prefix=0, ratio=0.0)
    flops = 2 * 8.03e9 * 256 + 4 * 32 * 32 * 128 * 256**2 / 2
    assert one.bytes == 1000 * 256 * 131_072
    assert one.prefill_s == pytest.approx(flops / 4e14)
    assert one.gpu_s == pytest.approx(2000 * flops / 4e14)
    assert one.gpu == pytest.approx(one.gpu_s * 0.001)
    assert one.month == pytest.approx(one.bytes / 1e9 * 0.02)
    assert one.copy_s == pytest.approx(one.bytes / 1e9)
    assert one.load_s == pytest.approx(0.033554432)
    assert one.reuses == pytest.approx(one.month / 1000 / (one.prefill_s * 0.001))
    assert one.first_reuses == pytest.approx(one.reuses + 2)
    assert break_even_bandwidth(one, 0.0) == pytest.approx(256 * 131_072 / one.prefill_s)


def test_a_shape_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    engine = models.engine("llama")
    found = model_shape(str(scene.save_model(tmp_path / "llama")))
    assert (found.spec, found.parameters, found.heads) == (
        engine.spec,
        engine.parameters,
        engine.heads,
    )
    with pytest.raises(ModelError, match="is none of qwen2.5-0.5b.* and: there is no folder"):
        model_shape(str(tmp_path / "nowhere"))
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**6}))
    with pytest.raises(ModelError, match="ragcache supports at most 1000"):
        model_shape(str(tmp_path / "llama"))


def test_rates() -> None:
    assert (
        parse_bandwidth("10Gbit/s") == 1.25e9
        and parse_bandwidth("1.5 GB/s") == 1.5e9
        and parse_bandwidth("100Mbps") == 1.25e7
    )
    for text in ("fast", "10", "0Gbit/s", "10 Gbyte"):
        with pytest.raises(ConfigError):
            parse_bandwidth(text)
    with pytest.raises(ConfigError, match="ratio from 0 to below 1"):
        estimate_corpus(MODEL_SHAPES["mistral-7b"], 1, HardwarePrices(), ratio=1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_replica_is_one_tier(policy: str) -> None:
    trace = zipf_trace(300, 100, per_request=4)
    one = simulate_routing(trace, policy, 1, 10_000)
    assert one == simulate_routing(trace, "turns", 1, 10_000) or policy != "turns"
    assert one.requests == (300,) and one.imbalance == 1
    assert one.hit_tokens + sum(one.loaded) == one.tokens


def test_affinity_holds_more_and_bounds_keep_it_even() -> None:
    trace = zipf_trace(4000, 2000, per_request=4)
    tokens = sum({asked.id: asked.tokens for request in trace for asked in request}.values())
    turns, affine, bounded = (simulate_routing(trace, p, 8, tokens // 20) for p in POLICIES)
    assert turns.imbalance == 1 and turns.hit_rate < bounded.hit_rate < affine.hit_rate + 0.02
    assert affine.imbalance > bounded.imbalance <= 1.11
    for one in (turns, affine, bounded):
        assert sum(one.requests) == 4000 and one.hit_tokens + sum(one.loaded) == one.tokens
    with pytest.raises(ConfigError, match="cannot route by 'best'"):
        simulate_routing(trace, "best", 2, 1)


def test_the_command(run: Run) -> None:
    code, out, _ = run("plan", "--model", "llama-3.1-8b", "--chunks", "1e6", "--link", "1Gbit/s")
    assert code == 0 and "131.1 kB per token" in out and "33.6 TB" in out
    code, out, _ = run("plan", "--model", "tiny")
    assert code == 0 and "1,000,000,000" in out and "cachegen" in out
    code, out, _ = run("simulate", "topics", "--capacity", "100MB", "--replicas", 4)
    assert code == 0 and "bounded" in out and "95.4 MiB in RAM each" in out
    code, _, err = run("plan", "--model", "tiny", "--link", "much")
    assert code == 1 and "is not a bandwidth" in err
