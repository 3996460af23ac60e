"""Full first layers, followed by the method's choice."""

from __future__ import annotations

import pytest

from ragcache.blend import Blender, blender, written
from ragcache.blend.cacheblend import CacheBlend
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError
from tests import models
from tests.blend import scene
from tests.blend.matrix import AT_ONE, AT_ZERO, PARTIAL, label


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", num_hidden_layers=6)


def test_full_layers_then_what_the_method_has_come_to(engine: TransformersEngine) -> None:
    """Its comparisons go on below the full layers, on its own rows."""
    plain = scene.run(engine, CacheBlend(0.3, gradual=True)).chosen
    fused = scene.run(engine, blender("cacheblend:gradual=true+full_layers=4", 0.3)).chosen
    everything = fused[0].tolist()
    assert all(rows.tolist() == everything for rows in fused[:4])
    assert len(fused[4]) == len(plain[4]) and len(fused[5]) == len(plain[5])
    assert len(fused[4]) < len(everything)


def test_the_mode_and_its_parameters_name_the_full_layers() -> None:
    made = blender("prophet+full_layers=2", 0.3)
    assert made.mode == "prophet+full_layers=2"
    assert made.parameters == {"recompute_ratio": 0.3, "full_layers": 2}


def test_a_model_needs_a_layer_after_the_full_ones(engine: TransformersEngine) -> None:
    with pytest.raises(ConfigError, match="full_layers is 6, but the model has 6 layers"):
        scene.run(engine, blender("random+full_layers=6"))


@pytest.mark.parametrize("made", AT_ZERO + AT_ONE + PARTIAL, ids=label)
def test_a_method_can_be_written_down(made: Blender) -> None:
    assert blender(written(made)) == made
