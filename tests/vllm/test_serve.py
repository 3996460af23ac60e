"""``ragcache serve --engine vllm``: the service in front of two vLLM servers, end to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ragcache import setup
from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.base import Miss
from ragcache.store.disk.store import DiskStore
from ragcache.types import Document
from tests.api.conftest import ANN, KEYS, Served, serving
from tests.vllm.scene import CONNECTOR, QUESTION, ROOT, TEXTS, WORKER, deadline

pytestmark = pytest.mark.vllm

DOCUMENTS = [Document(f"d{number}", text) for number, text in enumerate(TEXTS)]
QUESTIONS = (QUESTION, "Where is the old mill?", "Who built boats in Oslo?", "What is open?")
MODES = {"full": None, "reuse": None, "fused": 0.3, "cacheblend": 0.3, "prophet": 0.3}
START_S = 240
ENV = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


@dataclass
class Vllm:
    """A vLLM server of this test's."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait(self) -> None:
        until = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, f"not there after {START_S} s"
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)

    def kill(self) -> None:
        """With all its processes, at once."""
        os.killpg(self.process.pid, 9)
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started(command: list[str], env: dict[str, str], port: int, log: Path) -> Vllm:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | env, cwd=ROOT, start_new_session=True
        )
    return Vllm(process, f"http://127.0.0.1:{port}", log)


def vllm(model: Path, store: Path, log: Path) -> Vllm:
    port = free_port()
    connector = CONNECTOR | {"kv_connector_extra_config": {"store": str(store)}}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", str(port), "--worker-cls", WORKER),
        *("--kv-transfer-config", json.dumps(connector)),
    ]
    return started(command, ENV, port, log)


@pytest.fixture(scope="module")
def servers(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[Vllm]]]:
    store, logs = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("logs")
    running: list[Vllm] = []
    try:
        for number in range(2):
            running.append(vllm(tiny_model_dir, store, logs / f"vllm-{number}.log"))
        for one in running:
            one.wait()
        yield store, running
    finally:
        for one in running:
            if one.process.poll() is None:
                one.kill()


def settings(store: Path, **changes: Any) -> Settings:
    given = {"store": store, "max_tokens": 8, "top_k": 2, "ratio": 0.3, **changes}
    return Settings(**given)


@pytest.fixture(scope="module")
def running(tiny_model_dir: Path, servers: tuple[Path, list[Vllm]]) -> Iterator[Served]:
    """The service, with the documents of a tenant whose KV vLLM has computed."""
    from ragcache.vllm.engine import VllmEngine

    store, both = servers
    engine = VllmEngine(tiny_model_dir, [one.url for one in both], store)
    try:
        given = settings(store, engine="vllm")
        own = RagCache(engine, DiskStore(store), HashEmbedder(), store, given)
        limits = ServiceSettings.load(port=0)
        with serving(Service(own, Scheduler(), settings=limits), KEYS) as one:
            yield one
    finally:
        engine.close()


@pytest.fixture
def ann(running: Served) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=running.url, headers={"Authorization": f"Bearer {ANN}"}, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="module")
def embedded(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    """The same documents and the same tenant, with the model in this process."""
    path = tmp_path_factory.mktemp("embedded")
    engine = TransformersEngine.load(tiny_model_dir, dtype="float32")
    engine.repairs = False  # as vLLM
    with RagCache(
        engine, DiskStore(path), HashEmbedder(), path, settings(path), tenant="ann"
    ) as cache:
        cache.add(DOCUMENTS)
        yield cache


def test_documents_go_in_and_vllm_computes_their_kv(
    running: Served, ann: httpx.Client, embedded: RagCache
) -> None:
    given = [{"id": one.id, "text": one.text} for one in DOCUMENTS]
    with deadline(120):
        added = ann.post("/v1/documents", json={"documents": given})
    assert added.status_code == 200, added.text
    assert added.json()["documents"] == len(DOCUMENTS)
    cache = running.service.cache("ann")
    for document in DOCUMENTS:
        keys = cache.indexing.keys(document.id)
        assert keys == embedded.indexing.keys(document.id)
        for key in keys:
            mine, theirs = cache.store.get(key), embedded.store.get(key)
            assert not isinstance(mine, Miss) and not isinstance(theirs, Miss)
            for pair in zip(mine.keys + mine.values, theirs.keys + theirs.values, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                torch.tensor(mine.sensitivity),
                torch.tensor(theirs.sensitivity),
                rtol=1e-3,
                atol=1e-5,
            )


def test_a_text_of_one_token_is_computed(running: Served, embedded: RagCache) -> None:
    """A template may begin with one token, which is stored as every text before the chunks is."""
    [got] = running.service.cache("ann").engine.encode([(5,)])
    [want] = embedded.engine.encode([(5,)])
    for pair in zip(got.keys + got.values, want.keys + want.values, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", list(MODES))
def test_answers_are_those_of_the_embedded_engine(
    ann: httpx.Client, embedded: RagCache, mode: str
) -> None:
    for question in QUESTIONS:
        body = {"question": question, "mode": mode, "ratio": MODES[mode]}
        with deadline(60):
            got = ann.post("/v1/query", json=body)
        assert got.status_code == 200, got.text
        want = embedded.ask(question, mode=mode, ratio=MODES[mode])
        found, report = got.json(), got.json()["ragcache"]
        assert found["answer"] == want.text
        assert [p["id"] for p in found["passages"]] == [p.chunk.id for p in want.passages]
        assert report["reused_tokens"] == want.report.reused_tokens
        assert report["charged_budget"] == pytest.approx(want.report.charged_budget)
        assert [chunk["miss"] for chunk in report["chunks"]] == [
            chunk.miss for chunk in want.report.chunks
        ]


def test_a_sensitivity_that_is_missing_is_measured(running: Served, ann: httpx.Client) -> None:
    """KV that was stored without it, such as by an earlier release, is computed anew."""
    cache = running.service.cache("ann")
    [key] = cache.indexing.keys(DOCUMENTS[0].id)
    kv = cache.store.get(key)
    assert not isinstance(kv, Miss) and kv.sensitivity
    cache.store.delete(key)
    cache.store.put(key, replace(kv, sensitivity=()))
    body = {"question": QUESTION, "mode": "fused", "ratio": 0.3}
    with deadline(60):
        got = ann.post("/v1/query", json=body)
    assert got.status_code == 200, got.text
    until = time.monotonic() + 60
    while (
        isinstance(found := cache.store.get_headers([key], count=False)[0], Miss)
        or not found.sensitivity
    ):
        assert time.monotonic() < until, "it was not measured"
        time.sleep(0.1)
    assert found.sensitivity == pytest.approx(kv.sensitivity, rel=1e-3, abs=1e-5)


def test_langchain_works_through_it(running: Served, embedded: RagCache) -> None:
    from langchain_core.messages import HumanMessage
    from pydantic import SecretStr

    from ragcache.langchain import ChatRagCache

    model = ChatRagCache(
        base_url=f"{running.url}/v1", api_key=SecretStr(ANN), mode="fused", ratio=0.3
    )
    documents = [text for text in TEXTS[:2]]
    with deadline(60):
        said = model.invoke([HumanMessage(QUESTION)], documents=documents)
        streamed = "".join(
            str(piece.content)
            for piece in model.stream([HumanMessage(QUESTION)], documents=documents)
        )
    assert said.content == streamed
    chat = [{"role": "user", "content": QUESTION}]
    want = embedded.ask(messages=chat, chunks=documents, mode="fused", ratio=0.3)
    assert said.content == want.text


def test_settings_name_the_servers(
    tiny_model_dir: Path,
    servers: tuple[Path, list[Vllm]],
    embedded: RagCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "load_embedder", lambda *_: HashEmbedder())
    urls = ",".join(f"{one.url}/v1" for one in servers[1])
    given = {"engine": "vllm", "vllm_url": urls, "model": str(tiny_model_dir)}
    with pytest.raises(ConfigError, match="needs the dtype that the servers"):
        RagCache.open(tmp_path, settings=settings(tmp_path, **given))
    with RagCache.open(tmp_path, settings=settings(tmp_path, dtype="float32", **given)) as cache:
        assert cache.speeds() is None
        with deadline(60):
            answer = cache.ask(QUESTION, chunks=list(TEXTS), mode="full")
        assert answer.text == embedded.ask(QUESTION, chunks=list(TEXTS), mode="full").text


def test_overlapping_positions_are_refused(ann: httpx.Client) -> None:
    answer = ann.post("/v1/query", json={"question": QUESTION, "mode": "ape"})
    assert answer.status_code == 400 and "share positions" in answer.text


def test_one_server_is_killed_in_the_middle(
    running: Served, servers: tuple[Path, list[Vllm]], ann: httpx.Client, embedded: RagCache
) -> None:
    _, both = servers
    engine: Any = running.service.default_cache.engine
    asked = [(question, mode) for question in QUESTIONS for mode in MODES] * 3
    victim = both[0]

    def ask(question: str, mode: str) -> dict[str, Any]:
        body = {"question": question, "mode": mode, "ratio": MODES[mode], "temperature": 0}
        got = ann.post("/v1/query", json=body)
        assert got.status_code == 200, got.text
        return dict(got.json())

    with deadline(240), ThreadPoolExecutor(16) as pool:
        work = [pool.submit(ask, *one) for one in asked]
        until = time.monotonic() + 60
        while engine.replicas.busy()[victim.url] == 0:
            assert time.monotonic() < until, "the victim has had nothing to do"
            time.sleep(0.001)
        victim.kill()
        answers = [one.result() for one in work]
    moved = 0
    for (question, mode), answer in zip(asked, answers, strict=True):
        want = embedded.ask(question, mode=mode, ratio=MODES[mode])
        assert answer["answer"] == want.text
        moved += any("another server" in s for s in answer["ragcache"]["fallbacks"])
    assert moved > 0, "no request was under way at the server that was killed"
    assert ask(QUESTION, "fused")["answer"]


def test_with_no_server_left_it_says_so(
    servers: tuple[Path, list[Vllm]], ann: httpx.Client
) -> None:
    for one in servers[1]:
        if one.process.poll() is None:
            one.kill()
    with deadline(60):
        answer = ann.post("/v1/query", json={"question": QUESTION, "mode": "full"})
    assert answer.status_code >= 500 and "no vLLM server answers" in answer.text


def test_the_example_serves_and_ends_with_its_vllm(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As its users have it: ragcache's service in an environment of its own."""
    own = ROOT / ".venv" / "bin"
    if not (own / "python").exists():
        pytest.skip("make test-vllm sets up .venv, which the service runs in")
    port, behind = free_port(), free_port()
    env = ENV | {
        "PATH": f"{own}:{os.environ['PATH']}",
        "VLLM": sys.executable,
        "WORKER": WORKER,
        "MODEL": str(tiny_model_dir),
        "DTYPE": "float32",
        "STORE": str(tmp_path / "store"),
        "PORT": str(port),
        "BEHIND": str(behind),
    }
    command = ["sh", "examples/vllm/serve.sh", "--max-model-len", "2048", "--enforce-eager"]
    example = started(command, env, port, tmp_path / "log")
    try:
        example.wait()
        with httpx.Client(base_url=example.url, timeout=60) as client:
            given = {"documents": [{"id": one.id, "text": one.text} for one in DOCUMENTS]}
            assert client.post("/v1/documents", json=given).status_code == 200
            answer = client.post("/v1/query", json={"question": QUESTION, "mode": "reuse"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["ragcache"]["reused_tokens"] > 0
        example.process.terminate()
        assert example.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{behind}/health")
    finally:
        if example.process.poll() is None:
            example.kill()
