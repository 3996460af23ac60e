"""Settings that contradict each other are refused before a store is opened."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from ragcache.engine.base import Engine
from ragcache.errors import ConfigError, ModelError
from ragcache.rag import RagCache
from ragcache.retriever import embed
from ragcache.retriever.embed import SentenceTransformerEmbedder
from ragcache.settings import Settings
from ragcache.setup import attach_remote, load_embedder
from ragcache.store import Catalog, DiskStore, MemoryStore


def test_another_embedder_than_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryStore() as store:
        catalog = Catalog(store)
        catalog.put_setting("embedder", "mine")
        with pytest.raises(
            ConfigError, match="Use the store's own embedder, or index into a new folder"
        ):
            load_embedder(catalog, Settings.load(embedder="yours"))
    mute = torch.nn.Linear(1, 1)
    mute.get_embedding_dimension = lambda: None  # type: ignore[assignment]
    monkeypatch.setattr(embed, "load_model", lambda *_, **__: (mute, "digest"))
    with pytest.raises(ModelError, match="Choose another model"):
        SentenceTransformerEmbedder()


def test_a_store_cannot_be_opened_in_ways_that_do_not_go_together(tmp_path: Path) -> None:
    where = {"store": tmp_path / "s", "remote": (tmp_path / "far").as_uri()}
    with pytest.raises(ConfigError, match="codec int8 has lost some of it: leave remote_codecs"):
        RagCache.open(
            tmp_path / "s", settings=Settings.load(**where, remote_codecs="fp8", codec="int8")
        )
    with pytest.raises(ConfigError, match="engine vllm needs the dtype"):
        RagCache.open(
            tmp_path / "v",
            settings=Settings.load(store=tmp_path / "v", engine="vllm", vllm_url="http://[::1]:1"),
        )
    with pytest.raises(ConfigError, match="reads only the store in its folder"):
        attach_remote(
            cast(DiskStore, None), cast(Engine, object()), Settings.load(**where), pin=False
        )
