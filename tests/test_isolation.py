"""If one thing that KV depends on differs, no KV is reused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ragcache.engine.hf import fingerprint as module
from ragcache.engine.hf.fingerprint import fingerprint
from ragcache.store import ChunkKey, DiskStore, Miss
from ragcache.types import ChunkKV, Fingerprint
from tests import models
from tests.engine.hf.test_fingerprint import adapted, changed

TOKENS, PREFIX = (5, 6, 7), (1, 2)
OF_THE_MODEL = ("weights", "other weights", "config", "rope", "tokenizer", "template", "dtype")
OF_THE_KEY = ("codec", "adapter", "format", "encoding context", "prefix", "tenant", "tokens")


def plain() -> Fingerprint:
    return fingerprint(models.model("llama"), models.tokenizer(), "model")


def key_with(what: str, monkeypatch: pytest.MonkeyPatch) -> ChunkKey:
    """The key of a chunk where one thing is not as it was when the chunk was stored."""
    if what in OF_THE_MODEL:
        return ChunkKey(fingerprint(*changed(what), "model"), TOKENS, PREFIX)
    key = ChunkKey(plain(), TOKENS, PREFIX)
    if what in ("codec", "adapter", "format"):
        model = adapted() if what == "adapter" else models.model("llama")
        if what == "format":
            monkeypatch.setattr(module, "_FORMAT", "next")
        codec = "int8" if what == "codec" else "raw"
        return replace(key, fingerprint=fingerprint(model, models.tokenizer(), "m", codec=codec))
    return {
        "encoding context": replace(key, mode="bos"),
        "prefix": replace(key, context=(1, 3)),
        "tenant": replace(key, tenant="other"),
        "tokens": replace(key, tokens=(5, 6, 8)),
    }[what]


@pytest.mark.parametrize("what", OF_THE_MODEL + OF_THE_KEY)
def test_what_was_stored_for_another_is_never_served(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = torch.ones(2, len(TOKENS), 8)
    stored = ChunkKey(plain(), TOKENS, PREFIX)
    asked = key_with(what, monkeypatch)
    with DiskStore(tmp_path / "store") as store:
        store.put(stored, ChunkKV(TOKENS, (plane,) * 4, (plane,) * 4))
        assert store.has(stored)
        missed = store.get(asked)
        assert isinstance(missed, Miss) and store.stats().hits == 0
        same_content = what not in ("tenant", "tokens")
        assert missed.reason == ("stale" if same_content else "absent")
        assert store.variants.find(asked) == []
