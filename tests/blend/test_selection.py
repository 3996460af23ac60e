"""The rows that a method chooses, their charged budget, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ragcache.blend import BLENDERS, blender
from ragcache.blend.base import Layout, positions
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.full_layers import WithFullLayers
from ragcache.blend.fused import Fused
from ragcache.blend.random import Random
from ragcache.blend.ranking import Band, band, highest
from ragcache.blend.reuse import Reuse
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError
from tests import models
from tests.blend import matrix, scene


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6)


def layout() -> Layout:
    return Layout(scene.PROMPT, (True,) * 3, 1, positions(scene.PROMPT, "consecutive"))


def test_every_method_is_in_the_test_matrix() -> None:
    tested = {type(b) for b in matrix.AT_ONE + matrix.PARTIAL} - {WithFullLayers}
    assert tested == set(BLENDERS.values())
    assert all(name == cls.name for name, cls in BLENDERS.items())


def test_cacheblend_takes_the_most_deviating_rows(engine: TransformersEngine) -> None:
    """Against the deviation written out: fresh KV of layer 1 from a full prefill."""
    fused = scene.run(engine, CacheBlend(0.2, deviation="kv"))
    full = engine.prefill(scene.PROMPT.tokens).kv.buffers(1)
    reused = scene.run(engine, Reuse()).prefilled.kv.buffers(1)
    deviation = sum((a - b).square().sum((0, 1, 3)) for a, b in zip(full, reused, strict=True))
    assert isinstance(deviation, torch.Tensor)
    reusable = fused.layout.reusable
    count = int(0.2 * len(reusable))
    want = reusable[deviation[reusable].topk(count).indices].sort().values
    assert all(torch.equal(rows, want) for rows in fused.chosen[2:])
    assert all(torch.equal(rows, reusable) for rows in fused.chosen[:2])


def test_the_first_chunk_deviates_least(engine: TransformersEngine) -> None:
    """It stands where it was encoded: its rows are exact and never worth recomputing."""
    fused = scene.run(engine, CacheBlend(0.3))
    assert int(fused.chosen[-1].min()) >= scene.PROMPT.spans[1][0]


def test_charged_budget_counts_full_layers_in_full(engine: TransformersEngine) -> None:
    n = len(layout().reusable)
    single = scene.run(engine, CacheBlend(0.25))
    assert single.charged_budget == pytest.approx((2 * n + 4 * int(0.25 * n)) / (6 * n))
    same = scene.run(engine, blender("random+full_layers=2", 0.25))
    assert same.charged_budget == single.charged_budget
    assert scene.run(engine, Reuse()).charged_budget == 0


def test_gradual_filtering_shrinks_and_keeps_the_mean(engine: TransformersEngine) -> None:
    sizes = [len(rows) for rows in scene.run(engine, CacheBlend(0.4, gradual=True)).chosen]
    n = len(layout().reusable)
    assert sizes[:2] == [n, n] and sizes[2:] == sorted(sizes[2:], reverse=True)
    assert sizes[2] > 0.4 * n > sizes[-1]
    assert sum(sizes[2:]) / 4 == pytest.approx(0.4 * n, abs=1)


def test_fused_takes_the_most_sensitive_rows(engine: TransformersEngine) -> None:
    fused = scene.run(engine, Fused(0.3, attention=0))
    assert not fused.probed
    known = torch.tensor([u for chunk in scene.SENSITIVITIES for u in chunk])
    reusable = fused.layout.reusable
    want = reusable[known.topk(int(0.3 * len(known))).indices].sort().values
    assert all(torch.equal(rows, want) for rows in fused.chosen)


def test_rows_of_unknown_sensitivity_are_as_the_average() -> None:
    exact, known = (0.0,) * len(scene.CHUNKS[0]), scene.SENSITIVITIES[2]
    given = replace(layout(), sensitivities=(exact, (), known))
    usual = sum(known) / sum(value > 0 for value in known)
    first, second = len(exact), len(scene.CHUNKS[1])
    want = [*exact, *[usual] * second, *known]
    torch.testing.assert_close(given.sensitivity, torch.tensor(want))
    above = [n for n, value in enumerate(known) if value > usual]
    start, stop = scene.PROMPT.spans[1]
    last = scene.PROMPT.spans[2][0]
    ratio = (len(above) + second) / len(given.reusable) + 1e-6
    chosen = Fused(ratio, attention=0).selector(given, 6).first().tolist()
    assert chosen == [*range(start, stop), *(last + n for n in above)]
    alone = replace(layout(), sensitivities=(exact, (), ()))
    few = Fused(5 / len(alone.reusable) + 1e-6, attention=0)
    assert few.selector(alone, 6).first().tolist() == list(range(start, start + 5))
    assert first == start - len(scene.PREFIX)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_a_score_that_is_not_finite_spoils_no_other(score: float) -> None:
    """Every row has its place in the order, and those that stand first win where scores tie."""
    rows = layout().reusable
    plain = torch.arange(len(rows)).float()
    spoilt = plain.clone()
    spoilt[0] = score
    mended = plain.clone()
    mended[0] = plain.max() if score > 1 and score != 3e38 else plain[1:].min()
    if score == 3e38:
        mended = spoilt
    for count in (3, 9, len(rows)):
        got = highest(rows, spoilt, count)
        assert len(got) == count and torch.equal(got, highest(rows, mended, count))
    assert torch.equal(
        highest(rows, torch.full((len(rows),), score), 4), highest(rows, plain * 0, 4)
    )
    assert highest(rows, plain * 0, 4).tolist() == rows[:4].tolist()


def test_random_is_repeatable_and_follows_its_seed() -> None:
    first = [Random(0.3, seed=s).selector(layout(), 6).first().tolist() for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert len(first[0]) == int(0.3 * len(layout().reusable))


def test_modes_read_from_text() -> None:
    assert blender("cacheblend", 0.3) == CacheBlend(0.3)
    mode = "cacheblend:deviation=kv,gradual=true,check_layer=2"
    assert blender(mode) == CacheBlend(deviation="kv", gradual=True, check_layer=2)
    assert blender("reuse:positions=overlapping") == Reuse("overlapping")
    assert blender(Reuse()) == Reuse()


@pytest.mark.parametrize(
    ("mode", "ratio", "message"),
    [
        ("blend", None, "mode 'blend' is unknown: use one of full, prefix"),
        ("cacheblend", 1.5, "recompute_ratio is 1.5: it is the share .* from 0 to 1"),
        ("cacheblend", float("nan"), "recompute_ratio is nan"),
        ("random", -0.1, "recompute_ratio is -0.1"),
        ("reuse", 0.2, "mode 'reuse' takes no ratio: leave it out"),
        ("full", 0.2, "mode 'full' takes no ratio: leave it out"),
        ("cacheblend:depth=3", None, "no parameter 'depth'"),
        ("cacheblend:gradual=maybe", None, "gradual='maybe' cannot be read as bool"),
        ("cacheblend:deviation=q", None, "deviation is 'q': it must be one of v, k, kv"),
        ("reuse:positions=upside-down", None, "must be consecutive or overlapping"),
        ("random+full_layers=-1", None, "full_layers is -1: it must be 1 or more"),
        ("prophet+windows=8", None, "'windows=8' cannot be added to a mode: only full_layers=N"),
        ("infoflow:layers=upper", None, "layers is 'upper': it must be one of all, first"),
        ("ape:temperature=0", None, "temperature is 0.0: it must be in"),
        ("epic:first_tokens=-1", None, "first_tokens is -1"),
        ("kvshare:check_layer=-1", None, "check_layer is -1"),
        ("qcfuse:anchors=2", None, "anchors is 2.0: it is the share"),
        ("qcfuse:critical_layers=0", None, "critical_layers is 0"),
        ("cachecraft:alpha=-1", None, "alpha is -1.0: it must be 0 or more"),
        ("cachecraft:patience=0", None, "patience is 0"),
        ("fused:taper=2", None, "no parameter 'taper': it takes recompute_ratio"),
        ("cacheblend:check_layer=-1", None, "check_layer is -1"),
    ],
)
def test_what_cannot_be_is_refused(mode: str, ratio: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blender(mode, ratio)


def test_too_few_layers_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="checks layer 1 and needs a layer after it"):
        CacheBlend().selector(layout(), layers=2)


@pytest.mark.parametrize(
    ("name", "layers", "found"),
    [
        ("all", 7, range(0, 7)),
        ("first", 7, range(0, 3)),
        ("middle", 7, range(2, 5)),
        ("last", 7, range(4, 7)),
        ("middle", 12, range(4, 8)),
        ("last", 1, range(0, 1)),
    ],
)
def test_a_band_is_a_third_of_the_layers(name: Band, layers: int, found: range) -> None:
    assert band(name, layers) == found


def test_a_band_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers is 'most': it must be one of all, first"):
        band("most", 4)  # type: ignore[arg-type]
