"""Unpaired surrogates in any input become U+FFFD, and cause no error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.documents import Document as LangChainDocument

from ragcache import cli
from ragcache.api.batch_file import iter_answer_batch, read_batch
from ragcache.core.precompute import drive
from ragcache.langchain import ChatRagCache, RagCacheVectorStore, rag_messages
from ragcache.langchain.documents import from_document
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder, SentenceTransformerEmbedder
from ragcache.text import replace_surrogates, replace_surrogates_in
from ragcache.types import Chunk, Document, Sampling
from tests import scene
from tests.api.conftest import ANN, served
from tests.cli.test_commands import Run, model, notes, run

__all__ = ["model", "notes", "run"]  # fixtures

HALF, LATIN = "\ud83d", "caf\udce9"  # of an emoji; a byte of a command line that is no UTF-8
HALVES = f"Who {HALF} keeps {LATIN}?"
WHOLE = "Who \ufffd keeps caf\ufffd?"


def test_halves_meet_or_are_replaced() -> None:
    assert (
        replace_surrogates("\ud83d\ude00 and \U0001f600, na\u00efve")
        == "\U0001f600 and \U0001f600, na\u00efve"
    )
    assert replace_surrogates(HALVES) == WHOLE
    given = {HALF: [HALVES, 1, None, {"a": LATIN}], "b": "plain"}
    assert replace_surrogates_in(given) == {
        "\ufffd": [WHOLE, 1, None, {"a": "caf\ufffd"}],
        "b": "plain",
    }


def test_records_hold_whole_text() -> None:
    assert Document(HALF, HALVES, {HALF: LATIN}) == Document(
        "\ufffd", WHOLE, {"\ufffd": "caf\ufffd"}
    )
    assert Chunk(HALF, 0, HALVES, {"a": HALF}) == Chunk("\ufffd", 0, WHOLE, {"a": "\ufffd"})
    assert Sampling(stop=[HALF, "b"]).stop == ("\ufffd", "b")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    with scene.small(tmp_path_factory.mktemp("halves")) as cache:
        cache.add(scene.DOCUMENTS)
        yield cache


def test_tokenizer_and_embedders_take_them(cache: RagCache) -> None:
    for control in (False, True):
        tokens = cache.engine.tokenize(HALVES, control=control)
        assert tokens == cache.engine.tokenize(WHOLE, control=control)
    packaged = SentenceTransformerEmbedder()
    for embedder in (HashEmbedder(), packaged):
        assert (embedder.embed([HALVES]) == embedder.embed([WHOLE])).all()
    assert (packaged.embed_question(HALVES) == packaged.embed_question(WHOLE)).all()


def test_python(cache: RagCache) -> None:
    cache.add([Document(f"id {HALF}", HALVES, {"title": HALF})])
    assert cache.catalog.entry(f"id {HALF}") == cache.catalog.entry("id \ufffd") is not None
    options: dict[str, Any] = {"chunks": [HALVES], "instructions": HALF}
    answer = cache.ask(HALVES, **options, sampling=Sampling(2, stop=[HALF]))
    assert answer.prompt == cache.ask(WHOLE, chunks=[WHOLE], instructions="\ufffd").prompt
    assert cache.retrieve(HALVES)
    assert cache.delete([f"id {HALF}"]) == [f"id {HALF}"]
    assert cache.catalog.entry("id \ufffd") is None


def _chat(**changes: Any) -> dict[str, Any]:
    asked = {"model": "ragcache", "messages": [{"role": "user", "content": "Who?"}], **changes}
    return asked | {"max_tokens": 2}


def _message(**message: Any) -> dict[str, Any]:
    return _chat(messages=[{"role": "user", "content": "Who?", **message}])


QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("query", {"question": HALVES, "max_tokens": 2}),
    ("query", {"question": "Who?", "stop": HALF, "max_tokens": 2}),
    ("query", {"question": "Who?", "stop": ["a", HALF], "max_tokens": 2}),
    ("query", {"question": "Who?", "mode": f"reuse{HALF}"}),
    ("query", {"question": "Who?", HALF: 1}),
    ("chat/completions", _message(content=HALVES)),
    ("chat/completions", _message(content=[{"type": "text", "text": HALVES}])),
    ("chat/completions", _message(content=[{"type": HALF, "text": "Who?"}])),
    ("chat/completions", _message(name=HALF)),
    ("chat/completions", _message(role=HALF)),
    ("chat/completions", _chat(documents=[HALVES])),
    ("chat/completions", _chat(documents=[{"id": HALF, "text": HALVES, "title": HALF}])),
    ("chat/completions", _chat(model=HALF)),
    ("chat/completions", _chat(user=HALF, metadata={HALF: HALF})),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("search", {"question": HALVES}),
    ("documents", {"documents": [{"id": f"a{HALF}", "text": HALVES}]}),
    ("documents", {"documents": [{"id": "b", "text": "b", "metadata": {HALF: LATIN}}]}),
    ("jobs", {"documents": [{"id": f"c{HALF}", "text": HALVES, "metadata": {"title": HALF}}]}),
    ("jobs", {"documents": [{"id": f"c{HALF}", "text": HALVES}], "index": False}),
    ("chunks", {"chunks": [HALVES]}),
]
REFUSED = {"mode", "role", "model", HALF}  # fields whose value must be a known one


def is_refused(body: dict[str, Any]) -> bool:
    text = json.dumps(body)
    return (
        any(name in body and HALF in str(body[name]) for name in ("mode", "model"))
        or HALF in body
        or '"role": "\\ud83d"' in text
        or '"type": "\\ud83d"' in text
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("served")) as one, one.client(ANN) as client:
        documents = [{"id": d.id, "text": d.text} for d in scene.DOCUMENTS]
        client.post("/v1/documents", json={"documents": documents}).raise_for_status()
        yield client


@pytest.mark.parametrize(("route", "body"), QUESTIONS + OTHERS)
def test_routes(client: httpx.Client, route: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    found = client.post(f"/v1/{route}", content=content, headers=headers)
    expected = range(400, 405) if is_refused(body) else range(200, 300)
    assert found.status_code in expected, found.text
    json.loads(found.content.decode())


def test_routes_of_documents(client: httpx.Client) -> None:
    body = json.dumps({"documents": [{"id": f"a{HALF}", "text": HALVES}]})
    added = client.post("/v1/documents", content=body.encode())
    assert (
        added.status_code in (200, 400) and client.get("/v1/documents/%ED%A0%BD").status_code == 400
    )
    assert client.delete("/v1/documents/%ED%A0%BD").status_code == 400
    assert client.get("/v1/documents", params={"after": "%ED%A0%BD"}).status_code == 200


def test_batch_goes_on_behind_them(cache: RagCache, tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"{n}{HALF}", "method": "POST", "url": f"/v1/{route}", "body": body}
        for n, (route, body) in enumerate(QUESTIONS)
    ]
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = drive(iter_answer_batch(cache, read_batch(file), out), None)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.requests == len(results) == len(lines)
    refused = [bool(result["error"]) for result in results]
    assert refused == [is_refused(body) for _, body in QUESTIONS]
    assert all(result["custom_id"].endswith("\ufffd") for result in results)


def test_command_line(run: Run, model: Path, notes: Path, tmp_path: Path) -> None:
    (notes / LATIN).with_suffix(".txt").write_text("A caf\u00e9 by the sea.")
    (notes / "more.jsonl").write_text(json.dumps({"id": HALF, "text": HALVES, "title": LATIN}))
    code, out, err = run("index", notes, "--model", model)
    assert code == 0 and "5 documents indexed" in out, err
    code, out, err = run("documents")
    assert code == 0 and "caf\ufffd.txt" in out
    page = tmp_path / "page.html"
    code, _, err = run("query", HALVES, "--stop", HALF, "--max-tokens", 2, "--report", page)
    assert code == 0 and json.dumps(WHOLE)[1:-1] in page.read_text(encoding="utf-8"), err
    code, _, err = run("query", "Who?", "--mode", LATIN)
    assert code == 1 and "is unknown" in err
    code, out, err = run("delete", f"notes/{LATIN}.txt")
    assert code == 0 and "1 document deleted" in out, err


def test_paths_that_are_no_text(run: Run, model: Path, tmp_path: Path) -> None:
    """A store, a folder of documents and a link to a model; the model's own folder is refused."""
    folder, store, link = tmp_path / LATIN, tmp_path / f"store {LATIN}", tmp_path / "link"
    folder.mkdir()
    (folder / "a.txt").write_text("A caf\u00e9 by the sea.")
    shutil.copytree(model, tmp_path / f"model {LATIN}")
    link.symlink_to(tmp_path / f"model {LATIN}")
    code, out, err = run("index", folder, "--store", store, "--model", link)
    assert code == 0 and "1 document indexed" in out, err
    code, out, err = run("query", "Who?", "--store", store, "--max-tokens", 2)
    assert code == 0, err
    code, out, err = run("index", folder, "--store", store, "--prune")
    assert code == 0 and "1 unchanged" in out, err
    code, _, err = run("index", folder, "--store", tmp_path / "new", "--model", link.resolve())
    assert code == 1 and "has a name that is not UTF-8" in err


def test_output_that_cannot_be_encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(cli, "app", lambda: print(LATIN))
        cli.main()
    assert (tmp_path / "out").read_text(encoding="utf-8") == "caf\\udce9\n"


def test_langchain(cache: RagCache, client: httpx.Client) -> None:
    store = RagCacheVectorStore(cache)
    [name] = store.add_texts([HALVES], [{"a": HALF, "b": [HALF]}], ids=[f"lc{HALF}"])
    [found] = store.get_by_ids([name])
    assert (found.page_content, found.metadata["b"]) == (WHOLE, ["\ufffd"])
    assert store.similarity_search(HALVES)
    assert store.embeddings.embed_query(HALVES) == store.embeddings.embed_query(WHOLE)
    documents = [LangChainDocument(HALVES, id=HALF)]
    assert from_document(documents[0], HALF, whole=False).text == WHOLE
    url = str(client.base_url).rstrip("/") + "/v1"
    for place in ({"store": cache}, {"base_url": url, "api_key": ANN}):
        chat = ChatRagCache(**place, max_tokens=2)
        assert chat.invoke(rag_messages(HALVES, documents), stop=[HALF]).response_metadata
        assert list(chat.stream(rag_messages(HALVES, documents)))
    assert store.delete([name])
