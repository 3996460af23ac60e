"""Models for which fusion would be wrong are refused at load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.rope import Rope
from ragcache.errors import ConfigError, ModelError
from tests import models


def test_no_rope_is_refused() -> None:
    with pytest.raises(ModelError, match="gpt2 cannot be used"):
        models.engine("gpt2")


def test_unlike_keys_and_values_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        models.engine("deepseek_v3")


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="attend causally"):
        models.engine("gemma3_text", use_bidirectional_attention=True)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_rope_is_refused(rope_type: str) -> None:
    model = models.model("llama")
    model.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="changes with the prompt's length"):
        TransformersEngine(model, models.tokenizer(), name="llama")


def test_length_dependent_rope_of_one_kind_of_layer_is_refused() -> None:
    model = models.model("gemma3_text")
    longer = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    model.config.rope_parameters |= {"full_attention": longer}
    with pytest.raises(ModelError, match="changes with the prompt's length"):
        TransformersEngine(model, models.tokenizer(), name="gemma3")


def test_a_wrong_rotation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rope.rotate_into

    def wrong(self: Rope, keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        right(self, keys, cos, -sin, out)

    monkeypatch.setattr(Rope, "rotate_into", wrong)
    with pytest.raises(ModelError, match="layer 0 cannot be moved to position 5 .* silently wrong"):
        models.engine("llama")


def test_a_layer_that_sees_positions_otherwise_is_refused() -> None:
    """Its keys move, but what it adds to hidden states depends on where they are."""
    model = models.model("llama")

    def add(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
        return out + kwargs["position_ids"][..., None] / 10

    model.model.layers[1].register_forward_hook(add, with_kwargs=True)
    with pytest.raises(ModelError, match="cannot be moved"):
        TransformersEngine(model, models.tokenizer(), name="absolute")


def test_a_layer_that_looks_ahead_is_refused() -> None:
    model = models.model("llama")

    def leak(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + 0.1 * out[:, -1:]

    model.model.layers[1].register_forward_hook(leak)
    with pytest.raises(ModelError, match="cannot be used"):
        TransformersEngine(model, models.tokenizer(), name="leaky")


@pytest.mark.parametrize("broken", ["model.norm", "model.layers.2.input_layernorm"])
def test_nan_is_refused(broken: str) -> None:
    model = models.model("llama")
    with torch.no_grad():
        model.get_submodule(broken).weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="cannot be used"):
        TransformersEngine(model, models.tokenizer(), name="broken")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int3"}, "dtype 'int3' is unknown"), ({"device": "abacus"}, "device 'abacus'")],
)
def test_options_that_cannot_be(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersEngine.load("anything", **options)


def test_missing_model_says_what_to_give(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="there is no folder .* `tiny`"):
        TransformersEngine.load(tmp_path / "nothing")
