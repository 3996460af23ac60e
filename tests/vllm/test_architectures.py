"""Random models of several architectures, each in its own vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.blend.epic import Epic
from ragcache.blend.fused import Fused
from ragcache.blend.reuse import Reuse
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ModelError
from tests import models
from tests.blend.matrix import PARTIAL
from tests.families import FAMILIES
from tests.vllm import scene
from tests.vllm.scene import Request, Scene

pytestmark = pytest.mark.vllm

USABLE = [made for made in PARTIAL if made.placement == "consecutive"]
MODES = (Reuse(), Fused(0.3))
RANDOM: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "rope_theta": 1e4},
    "qwen2": {"head_dim": 32, "hidden_size": 128},
    "qwen3": {"head_dim": 32},
}


@pytest.mark.parametrize("architecture", list(RANDOM))
def test_random_models_too(architecture: str, tmp_path: Path) -> None:
    path = tmp_path
    changes = {"hidden_size": 128, "num_hidden_layers": 6, **RANDOM[architecture]}
    models.model(architecture, **changes).save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    made = Scene.of(TransformersEngine.load(path, dtype="float32"), path / "store")
    made.keep_variants()
    with scene.started(path, made.path) as llm:
        modes = [*USABLE, Epic(512)]
        said = made.ask(llm, [Request.fused(made.prompt, mode, made) for mode in modes], 120)
    for mode, one in zip(modes, said, strict=True):
        made.check(one, made.prompt, mode)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B YaRN", "Mistral-Nemo-2407", "phi-4"])
def test_ropes_of_published_checkpoints(name: str, tmp_path: Path) -> None:
    """Scaled, stretched, far or partial."""
    made = saved(name, tmp_path)
    with scene.started(tmp_path, made.path) as llm:
        said = made.ask(llm, [Request.fused(made.prompt, mode, made) for mode in MODES])
    for mode, one in zip(MODES, said, strict=True):
        made.check(one, made.prompt, mode)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("GLM-4-9B-0414", "does not rotate halves of keys"),
        ("OLMo-2-1124-7B", "no layer of vLLM's model has RoPE"),
        ("granite-3.3-8b", "its layers cannot be driven"),
    ],
)
def test_what_cannot_be_driven_does_not_start(name: str, why: str, tmp_path: Path) -> None:
    made = saved(name, tmp_path)
    with pytest.raises(ModelError, match=why), scene.started(tmp_path, made.path):
        pass


def saved(name: str, path: Path) -> Scene:
    """A narrow model of a family, in a folder with its store."""
    FAMILIES[name].model(torch.float32).save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    return Scene.of(TransformersEngine.load(path, dtype="float32"), path / "store")
