"""Errors that no other test meets: each is made as a user would, and says what to do."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lmdb
import numpy as np
import pytest
import torch

from ragcache.api import batch_file, report_page
from ragcache.api.middleware.auth import ApiKeys
from ragcache.blend import blender
from ragcache.blend.full import Full
from ragcache.cli import app
from ragcache.core.missed import _check_window
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.engine.hf.engine import as_device
from ragcache.engine.hf.rope import Rope
from ragcache.errors import (
    ConfigError,
    ModelError,
    PromptError,
    RagCacheError,
    SourceError,
    StoreError,
)
from ragcache.eval.dataset import load
from ragcache.langchain import ChatRagCache
from ragcache.planning.flops import Model
from ragcache.rag import RagCache
from ragcache.retriever import embed
from ragcache.retriever.embed import SentenceTransformerEmbedder, _normalised
from ragcache.retriever.source import read
from ragcache.settings import Settings
from ragcache.setup import embedder_of, over_remote
from ragcache.sim.eviction import simulate
from ragcache.sim.trace import scans, topics
from ragcache.store import Catalog, DiskStore, MemoryStore
from ragcache.store.catalog.chunks import _vector
from ragcache.store.format.checksummed import put_sealed
from ragcache.store.lmdb.directory import explained
from ragcache.types import Chunk, ChunkKV, Document, KVSpec, Prompt
from tests import models, scene
from tests.api.conftest import ANN, served
from tests.store.samples import ONE, make_kv


def test_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(response: Any) -> tuple[int, str]:
        return response.status_code, response.json()["error"]["message"]

    with served(tmp_path / "store") as one, one.client(ANN) as ann:
        status, message = said(ann.get("/demo/nothing.js"))
        assert status == 404 and "the page is at /demo" in message
        status, message = said(ann.get("/v1/models/gpt"))
        assert status == 404 and "or 'ragcache'" in message
        document = {"data": "Oslo", "text": "Bexley"}
        chat = {"messages": [{"role": "user", "content": "Who?"}], "model": "ragcache"}
        status, message = said(
            ann.post("/v1/chat/completions", json=chat | {"documents": [document]})
        )
        assert status == 400 and "no other fields beside it" in message


def test_a_chunk_that_is_not_what_the_model_computes(tmp_path: Path) -> None:
    with served(tmp_path / "store") as one, one.client(ANN) as ann:
        cache = one.service.cache("ann")
        cache.add(scene.DOCUMENTS)
        for key in [
            key for document in scene.DOCUMENTS for key in cache.indexing.keys(document.id)
        ]:
            kv = cache.store.get(key)
            assert isinstance(kv, ChunkKV)
            cache.store.put(key, replace(kv, values=tuple(value + 1 for value in kv.values)))
        answer = ann.get("/ready")
        assert answer.status_code == 503 and "Try again later" in answer.json()["error"]["message"]


def test_keys_and_reports(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Name a file of lines name:key"):
        ApiKeys.of(Settings.load(keys=tmp_path / "none"))
    with scene.small(tmp_path / "store") as cache, pytest.raises(ConfigError, match="Name a file"):
        report_page.write_report(Path("/dev/full"), "Who?", {}, cache)  # a disk without space


def test_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SourceError, match="Set root above it"):
        list(read([tmp_path / "a.txt"], root=tmp_path / "below"))

    def refuse(self: Path, *_: Any, **__: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match="Permission denied. Check its permissions"):
        list(read([tmp_path / "a.txt"]))


def test_embedders() -> None:
    with pytest.raises(ModelError, match="Load it in float32"):
        _normalised(np.array([[1.0, np.nan]], np.float32), "some-model")


def test_vectors_that_are_damaged() -> None:
    with MemoryStore() as store:
        catalog = Catalog(store)
        catalog.put_document(scene.DOCUMENTS[0], [], np.ones((0, 4), np.float32), b"")
        with pytest.raises(StoreError, match="index the documents again"):
            with store.tables.read() as txn:
                _vector(txn, b"12345678")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (lmdb.MapResizedError("mdb"), "open it with that map_size"),
        (lmdb.PanicError("mdb"), "close the store and open it again"),
        (lmdb.ReadersFullError("mdb"), "Close some of them"),
    ],
)
def test_what_the_store_below_says(tmp_path: Path, error: lmdb.Error, fix: str) -> None:
    with pytest.raises(StoreError, match=fix), explained(tmp_path, "write to"):
        raise error


def test_a_store_in_a_fork(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        store.put(ONE, make_kv(ONE))
        answers = multiprocessing.get_context("spawn").SimpleQueue()
        if (child := os.fork()) == 0:
            try:
                store.has(ONE)
            except StoreError as error:
                answers.put(str(error))
            os._exit(0)
        os.waitpid(child, 0)
        assert "start workers with the spawn method" in answers.get()


def test_tables_that_are_closed() -> None:
    store = MemoryStore()
    store.close()
    with pytest.raises(StoreError, match="open it again"), store.tables.read():
        pass


def test_modes_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not both"):
        blender(Full(), 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU: use cpu"):
        as_device("cuda")


def test_models_and_prompts() -> None:
    with pytest.raises(ModelError, match="Use a RoPE decoder such as"):
        Rope.of(torch.nn.Linear(1, 1))
    with pytest.raises(PromptError, match="give it a question"):
        models.engine("llama").prefill(())
    windowed = cast(Engine, SimpleNamespace(name="mistral", sliding_window=4))
    with pytest.raises(ConfigError, match="Use positions=consecutive"):
        _check_window(windowed, PromptRequest(Prompt((1, 2), ((3, 4),), (5,)), Full()))


def test_simulated_stores() -> None:
    with pytest.raises(ConfigError, match="needs at least 1"):
        simulate([], "lru", 0, Model(KVSpec(2, 2, 8, "float32"), 1000, 2))
    with pytest.raises(ConfigError, match="let at least 1 request pass"):
        scans([], 0, 1)


def test_a_service_that_cannot_be_asked() -> None:
    with pytest.raises(RagCacheError, match="request to the service failed: .*Check base_url"):
        ChatRagCache(base_url="ftp://nowhere").invoke("Who?")


def test_another_embedder_than_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryStore() as store:
        catalog = Catalog(store)
        catalog.put_setting("embedder", "mine")
        with pytest.raises(ConfigError, match="Use the store's own, or index into a new folder"):
            embedder_of(catalog, Settings.load(embedder="yours"))
    mute = torch.nn.Linear(1, 1)
    mute.get_embedding_dimension = lambda: None  # type: ignore[assignment]
    monkeypatch.setattr(embed, "_load", lambda *_: mute)
    with pytest.raises(ModelError, match="Choose another model"):
        SentenceTransformerEmbedder()


def test_a_vector_of_another_length() -> None:
    with MemoryStore() as store:
        catalog = Catalog(store)
        chunk = Chunk("a", 0, "text")
        vectors = np.ones((1, 4), np.float32)
        catalog.put_document(Document("a", "text"), [chunk], vectors, b"", contents=[ONE.content])
        with store.tables.write() as txn:
            (row,) = list(txn.keys("vectors"))
            put_sealed(txn, "vectors", row, np.ones(3, np.float32).tobytes())
        with pytest.raises(StoreError, match="has 3 numbers, not 4: index its document again"):
            catalog.vectors()


def test_files_to_write_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["ragcache", "eval", "--report", str(tmp_path / "no" / "x.json")]
    )
    with pytest.raises(ConfigError, match="there is no folder"):
        app(standalone_mode=False)
    with pytest.raises(SourceError, match="Name a file of UTF-8 text"):
        load(tmp_path / "none.jsonl")


def test_a_store_cannot_be_opened_in_ways_that_do_not_go_together(tmp_path: Path) -> None:
    where = {"store": tmp_path / "s", "remote": (tmp_path / "far").as_uri()}
    with pytest.raises(ConfigError, match="codec int8 has lost some of it: leave levels"):
        RagCache.open(tmp_path / "s", settings=Settings.load(**where, levels="fp8", codec="int8"))
    with pytest.raises(ConfigError, match="engine vllm needs to know the dtype"):
        RagCache.open(
            tmp_path / "v",
            settings=Settings.load(store=tmp_path / "v", engine="vllm", vllm_url="http://[::1]:1"),
        )
    with pytest.raises(ConfigError, match="reads the store in its folder and no remote"):
        over_remote(
            cast(DiskStore, None), cast(Engine, object()), Settings.load(**where), pin=False
        )


def test_a_trace_draws_no_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match="ask for at most as many as a document has"):
        topics(1, documents=1, each=2, per_request=3)


def test_a_line_of_a_batch_has_known_fields(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"body": {"question": "Who?"}, "colour": "red"}\n', encoding="utf-8")
    (request,) = batch_file.read_batch(file)
    assert "colour: unknown field: leave it out" in str(request.body)
