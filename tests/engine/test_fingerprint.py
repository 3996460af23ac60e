"""Another model, however like, has another fingerprint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.engine.fingerprint import cached_weights_digest, fingerprint, weights_digest
from ragcache.models.kept import identity_of
from tests import models


def changed(what: str) -> tuple[Any, Any]:
    """A model and tokenizer that differ from the plain ones in one thing."""
    model, tokenizer = models.model("llama"), copy.deepcopy(models.tokenizer())
    if what == "weights":  # same shape, one number
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    elif what == "other weights":
        model = models.model("llama", seed=1)
    elif what == "config":
        model.config.rms_norm_eps *= 2
    elif what == "rope":
        model = models.model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    elif what == "tokenizer":
        tokenizer.add_tokens(["<new>"])
    elif what == "template":
        tokenizer.chat_template = "{{ messages }}"
    elif what == "dtype":
        model = model.to(torch.bfloat16)
    return model, tokenizer


def test_the_same_model_has_the_same_fingerprint() -> None:
    first = fingerprint(models.model("llama"), models.tokenizer(), "a")
    again = fingerprint(models.model("llama"), models.tokenizer(), "b")
    assert first == again and first.digest == again.digest
    assert str(first).startswith("a@")


@pytest.mark.parametrize(
    "what", ["weights", "other weights", "config", "rope", "tokenizer", "template", "dtype"]
)
def test_one_change_is_another_fingerprint(what: str) -> None:
    plain = fingerprint(*changed("nothing"), "model")
    other = fingerprint(*changed(what), "model")
    assert plain != other and plain.digest != other.digest


def test_weights_are_digested_once_for_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, other = models.model("llama"), models.model("llama", seed=1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = cached_weights_digest(model, identity_of([file]))
    assert (
        first == weights_digest(model) == cached_weights_digest(other, identity_of([file]))
    )  # from the cache
    file.write_bytes(b"changed")
    assert cached_weights_digest(other, identity_of([file])) == weights_digest(other) != first
    half = models.model("llama").to(torch.bfloat16)
    assert cached_weights_digest(half, identity_of([file])) == weights_digest(half)
    [kept, *_] = (tmp_path / "cache" / "ragcache").iterdir()
    for damaged in (tmp_path / "cache" / "ragcache").iterdir():
        damaged.write_text("damage")
    assert cached_weights_digest(other, identity_of([file])) == weights_digest(other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept there
    assert cached_weights_digest(other, identity_of([file])) == weights_digest(other)


def test_a_digest_is_never_known_by_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="the files that the model was loaded from are not known"):
        cached_weights_digest(models.model("llama"), [])
    assert list(tmp_path.iterdir()) == []


def test_adapters_count_with_their_settings() -> None:
    """Their tensors are among the weights, but neither their scale is, nor which are active."""

    class Adapter:
        def __init__(self, alpha: int) -> None:
            self.alpha = alpha

        def to_dict(self) -> dict[str, Any]:
            return {"lora_alpha": self.alpha, "target_modules": {"q_proj", "v_proj"}}

    found = set()
    for alpha, active in ((8, "a"), (16, "a"), (8, "b")):
        model = models.model("llama")
        model.peft_config = {"a": Adapter(alpha), "b": Adapter(8)}
        model.active_adapters = lambda active=active: [active]
        found.add(fingerprint(model, models.tokenizer(), "m").digest)
    found.add(fingerprint(models.model("llama"), models.tokenizer(), "m").digest)
    assert len(found) == 4
    assert dict(fingerprint(models.model("llama"), models.tokenizer(), "m").fields)["adapter"] == ""


def test_codec_counts() -> None:
    model, tokenizer = changed("nothing")
    raw, int8 = (fingerprint(model, tokenizer, "m", codec=c) for c in ("raw", "int8"))
    assert raw.digest != int8.digest
