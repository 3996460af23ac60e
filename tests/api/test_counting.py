"""``/v1/tokenize``: the model's own tokens, and their number, without an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.conftest import Served
from tests.scene import DOCUMENTS

TEXTS = [document.text for document in DOCUMENTS]


def test_a_text(running: Served, ann: httpx.Client) -> None:
    engine = running.service.default_cache.engine
    for text in (TEXTS[0], "", " \n", "<eos> 日本 🎉"):
        found = ann.post("/v1/tokenize", json={"text": text}).json()
        assert found["tokens"] == list(engine.tokenize(text))
        assert found["count"] == len(found["tokens"])
    assert (found["object"], found["context_tokens"]) == ("ragcache.tokens", 512)


@pytest.mark.parametrize("documents", [TEXTS, [{"title": "Mill", "text": TEXTS[1], "id": 0}], []])
def test_a_prompt_has_what_its_answer_says(ann: httpx.Client, documents: Any) -> None:
    given = {"documents": documents}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who grinds?"},
    ]
    counted = ann.post("/v1/tokenize", json={"messages": messages, **given}).json()
    chat = {"model": "ragcache", "messages": messages, "max_tokens": 1, **given}
    answer = ann.post("/v1/chat/completions", json=chat).json()
    assert counted["count"] == answer["usage"]["prompt_tokens"]
    for part in ("prefix_tokens", "chunk_tokens", "question_tokens"):
        assert counted[part] == answer["ragcache"][part]


def test_a_question_has_what_its_answer_says(ann: httpx.Client) -> None:
    asked = ann.post("/v1/query", json={"question": "Who grinds?", "max_tokens": 1}).json()
    texts = [passage["text"] for passage in asked["passages"]]
    body = {"question": "Who grinds?", "documents": texts}
    counted = ann.post("/v1/tokenize", json=body).json()
    assert counted["count"] == asked["usage"]["prompt_tokens"]
    alone = ann.post("/v1/tokenize", json={"question": ""}).json()
    assert alone["count"] == alone["prefix_tokens"] == counted["prefix_tokens"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "give either a text, or a question or messages"),
        ({"text": "a", "question": "b"}, "give either a text, or a question or messages"),
        ({"text": "a", "documents": []}, "documents belong to a question"),
        ({"question": "a", "messages": []}, "messages"),
        ({"question": "a", "tools": [{}]}, "tools belong to messages"),
        (
            {"question": "a", "ragcache": {"template": "{{ messages }}"}},
            "a chat template is a program",
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 8193}]},
            "8193 characters are more than the limit of 8192",
        ),
        ({"question": "a", "documents": "b"}, "documents"),
        ({"question": "a", "documents": [" "]}, "a chunk is empty"),
        ({"question": "a", "documents": [{"id": "x"}]}, "has no text"),
        ({"text": "a" * 8193}, "8193 characters are more than the limit of 8192"),
        (
            {"question": "a", "documents": ["b" * 8192]},
            "8193 characters are more than the limit of 8192",
        ),
        ({"text": "a", "more": 1}, "more: this field is unknown"),
    ],
)
def test_what_is_refused(ann: httpx.Client, body: dict[str, Any], says: str) -> None:
    refused = ann.post("/v1/tokenize", json=body)
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]


def test_a_key_is_needed(clients: Callable[..., httpx.Client]) -> None:
    assert clients(None).post("/v1/tokenize", json={"text": "a"}).status_code == 401


def test_an_id_of_a_chat_may_be_nought(ann: httpx.Client) -> None:
    chat = {
        "model": "ragcache",
        "messages": [{"role": "user", "content": "Who?"}],
        "documents": [{"id": 0, "text": TEXTS[0]}],
        "max_tokens": 1,
    }
    (chunk,) = ann.post("/v1/chat/completions", json=chat).json()["ragcache"]["chunks"]
    assert chunk["id"] == "0#0"
