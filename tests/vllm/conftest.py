"""One vLLM for all tests of a module that need no special configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ragcache.engine.hf.engine import TransformersEngine
from tests.vllm import scene


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> scene.Scene:
    """The small trained model, three of whose chunks make a prompt."""
    engine = TransformersEngine.load(tiny_model_dir, dtype="float32")
    return scene.Scene.of(engine, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path, tiny: scene.Scene) -> Iterator[Any]:
    """vLLM with that model and its store."""
    with scene.started(tiny_model_dir, tiny.path) as made:
        yield made
