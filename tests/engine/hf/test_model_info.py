"""The info of a model that is not loaded equals that of the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.model_info import ModelInfo
from ragcache.errors import ModelError
from tests import models


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_that_of_the_loaded_model(tmp_path: Path, architecture: str, dtype: str) -> None:
    path = tmp_path / "model"
    models.model(architecture).save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    first, again = (ModelInfo.of(str(path), dtype, "int8") for _ in range(2))
    engine = TransformersEngine.load(path, dtype=dtype, codec="int8")
    assert first.fingerprint == again.fingerprint == engine.fingerprint
    assert str(first.fingerprint) == str(engine.fingerprint)
    assert first.spec == engine.spec
    assert first.context_tokens == engine.context_tokens
    assert first.ends == {2}


def test_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config.json"):
        ModelInfo.of(str(tmp_path), "float32")
