"""Models that differ in anything have different fingerprints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.engine.hf.fingerprint import cached_weights_digest, fingerprint, weights_digest
from ragcache.models.file_cache import file_identity
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
    first = cached_weights_digest(model, file_identity([file]))
    assert (
        first == weights_digest(model) == cached_weights_digest(other, file_identity([file]))
    )  # from the cache
    file.write_bytes(b"changed")
    assert cached_weights_digest(other, file_identity([file])) == weights_digest(other) != first
    half = models.model("llama").to(torch.bfloat16)
    assert cached_weights_digest(half, file_identity([file])) == weights_digest(half)
    [kept, *_] = (tmp_path / "cache" / "ragcache").iterdir()
    for damaged in (tmp_path / "cache" / "ragcache").iterdir():
        damaged.write_text("damage")
    assert cached_weights_digest(other, file_identity([file])) == weights_digest(other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept there
    assert cached_weights_digest(other, file_identity([file])) == weights_digest(other)


def test_a_digest_is_never_known_by_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="the files that the model was loaded from are not known"):
        cached_weights_digest(models.model("llama"), [])
    assert list(tmp_path.iterdir()) == []


class Adapter:
    """The settings of an adapter, as peft keeps them."""

    def to_dict(self) -> dict[str, Any]:
        return {"r": 4, "target_modules": {"q_proj", "v_proj"}}


class Adapted(torch.nn.Module):
    """A module that two adapters are put on, as peft's is."""

    def __init__(self, active: str, scale: float, disabled: bool) -> None:
        super().__init__()
        self.active_adapters, self.disable_adapters = [active], disabled
        self.merged_adapters: list[str] = []
        self.scaling = {"a": scale, "b": 2.0}


def adapted(active: str = "a", scale: float = 2.0, disabled: bool = False) -> Any:
    """A model with two adapters on one of its modules."""
    model: Any = models.model("llama")
    model.peft_config = {"a": Adapter(), "b": Adapter()}
    model.model.layers[0].mlp.gate_proj.adapter = Adapted(active, scale, disabled)
    return model


def test_adapters_count_with_their_settings() -> None:
    """Their tensors are among the weights, but neither their scale is, nor which are active."""
    made = [adapted(), adapted(scale=4.0), adapted(active="b"), adapted(disabled=True)]
    made.append(models.model("llama"))
    found = [fingerprint(model, models.tokenizer(), "m") for model in made]
    assert len({one.digest for one in found}) == len(made)
    assert dict(found[-1].fields)["adapter"] == ""


def test_codec_counts() -> None:
    model, tokenizer = changed("nothing")
    raw, int8 = (fingerprint(model, tokenizer, "m", codec=c) for c in ("raw", "int8"))
    assert raw.digest != int8.digest
