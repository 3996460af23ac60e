"""Random models of several architectures, each in a vLLM of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ragcache.blend.epic import Epic
from ragcache.engine.transformers import TransformersEngine
from tests import models
from tests.blend.matrix import PARTIAL
from tests.vllm import scene
from tests.vllm.scene import Request, Scene

pytestmark = pytest.mark.vllm

USABLE = [made for made in PARTIAL if made.placement == "consecutive"]
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
