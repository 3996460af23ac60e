"""Windows, successors, first rows and full layers, written out by hand."""

from __future__ import annotations

import pytest
import torch

from ragcache.blend import Blender, blender, written
from ragcache.blend.cacheblend import CacheBlend
from ragcache.blend.score_filters import First, Shaped, Successors, Windows
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError
from tests import models
from tests.blend import scene
from tests.blend.matrix import AT_ONE, AT_ZERO, PARTIAL, label

# Two chunks: rows 3..7 and 8..11; row 5 is not among those in play.
ROWS = torch.tensor([3, 4, 6, 7, 8, 9, 10, 11])
CHUNK = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
PLACE = torch.tensor([0, 1, 3, 4, 0, 1, 2, 3])
SCORES = torch.tensor([8, 0, 2, 0, 6, 0, 0, 3], dtype=torch.float64)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6)


def test_windows_average_within_a_chunk() -> None:
    got = Windows(3)(SCORES, ROWS, CHUNK, PLACE)
    want = torch.tensor([4, 10 / 3, 2 / 3, 1, 3, 2, 1, 1.5], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    assert torch.equal(Windows(1)(SCORES, ROWS, CHUNK, PLACE), SCORES)


def test_successors_share_a_score_within_a_chunk() -> None:
    one = Successors()(SCORES, ROWS, CHUNK, PLACE)
    assert one.tolist() == [8, 8, 2, 2, 6, 6, 0, 3]
    three = Successors(3)(SCORES, ROWS, CHUNK, PLACE)
    assert three.tolist() == [8, 8, 8, 2, 6, 6, 6, 6]


def test_first_rows_lead_in_their_order() -> None:
    order = First(2)(SCORES, ROWS, CHUNK, PLACE).argsort(descending=True, stable=True)
    assert ROWS[order].tolist() == [3, 8, 4, 9, 11, 6, 7, 10]


def test_shapes_change_what_is_chosen_but_not_how_much(engine: TransformersEngine) -> None:
    plain = scene.run(engine, CacheBlend(0.3))
    for text in ("windows=4", "successors", "first=2"):
        shaped = scene.run(engine, blender(f"cacheblend+{text}", 0.3))
        assert [len(rows) for rows in shaped.chosen] == [len(rows) for rows in plain.chosen]
        assert not torch.equal(shaped.chosen[-1], plain.chosen[-1])
    first = set(scene.run(engine, blender("cacheblend+first=2", 0.3)).chosen[-1].tolist())
    assert first >= {start + i for start, _ in scene.PROMPT.spans for i in (0, 1)}


def test_full_layers_then_what_the_method_has_come_to(engine: TransformersEngine) -> None:
    """Its comparisons go on below the full layers, on its own rows."""
    plain = scene.run(engine, CacheBlend(0.3, gradual=True)).chosen
    fused = scene.run(engine, blender("cacheblend:gradual=true+full_layers=4", 0.3)).chosen
    everything = fused[0].tolist()
    assert all(rows.tolist() == everything for rows in fused[:4])
    assert len(fused[4]) == len(plain[4]) and len(fused[5]) == len(plain[5])
    assert len(fused[4]) < len(everything)


def test_a_shaped_mode_says_what_it_is() -> None:
    made = blender("prophet+windows=8+first=4+full_layers=2", 0.3)
    assert isinstance(made, Shaped)
    assert made.mode == "prophet+windows=8+first=4+full_layers=2"
    assert made.parameters == {
        "recompute_ratio": 0.3,
        "windows": 8,
        "first": 4,
        "full_layers": 2,
    }


def test_what_cannot_be_shaped_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(ConfigError, match="mode reuse ranks no rows, so windows cannot be used"):
        scene.run(engine, blender("reuse+windows=8"))
    with pytest.raises(ConfigError, match="full_layers is 6, but the model has 6 layers"):
        scene.run(engine, blender("random+full_layers=6"))


@pytest.mark.parametrize("made", AT_ZERO + AT_ONE + PARTIAL, ids=label)
def test_a_method_can_be_written_down(made: Blender) -> None:
    assert blender(written(made)) == made
