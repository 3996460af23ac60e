"""Questions over HTTP: answers, streams and refusals."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.api.conftest import Served

QUESTION = "Where does Mira Holt live?"
HUGE = {"const": 10**400}


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def chat(client: httpx.Client, content: Any = QUESTION, **fields: Any) -> httpx.Response:
    messages = content if isinstance(content, list) and "role" in content[0] else None
    messages = messages or [{"role": "user", "content": content}]
    body = {"model": "ragcache", "messages": messages, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_query_answers_as_the_pipeline_does(running: Served, ann: httpx.Client) -> None:
    found = ann.post("/v1/query", json={"question": QUESTION, "mode": "full"}).json()
    want = running.service.scheduler.call(
        lambda: running.service.cache("ann").ask(QUESTION, mode="full")
    ).result()
    assert found["answer"] == want.text and found["ragcache"]["mode"] == "full"
    assert [p["id"] for p in found["passages"]] == [p.chunk.id for p in want.passages]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    reused = ann.post("/v1/query", json={"question": QUESTION, "mode": "reuse"}).json()
    report = reused["ragcache"]
    cached = reused["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == report["reused_tokens"] + report["loaded_text_tokens"]
    assert report["reused_tokens"] > 0 and report["loaded_text_tokens"] > 0


def test_a_search_finds_what_a_query_answers_from(running: Served, ann: httpx.Client) -> None:
    asked = {"question": QUESTION, "top_k": 1, "neighbours": 1}
    found = ann.post("/v1/search", json=asked).json()["data"]
    assert [p["id"] for p in found] == [
        p["id"] for p in ann.post("/v1/query", json=asked).json()["passages"]
    ]
    catalog = running.service.cache("ann").catalog
    assert [p["chunks"] for p in found] == [len(catalog.rows_of(p["document"])) for p in found]
    assert found[0]["text"] and found[0]["score"] > 0
    refused = ann.post("/v1/search", json={**asked, "top_k": 0})
    assert refused.status_code == 400 and "top_k" in refused.json()["error"]["message"]
    blank = ann.post("/v1/search", json={"question": " "})
    assert blank.status_code == ann.post("/v1/query", json={"question": " "}).status_code


def test_a_filter_is_of_what_is_searched(ann: httpx.Client) -> None:
    shelved = [
        {"id": "old", "text": "Mira Holt lived in York.", "metadata": {"year": "1990"}},
        {"id": "new", "text": "Mira Holt lives in Oslo.", "metadata": {"year": "2020"}},
    ]
    assert ann.post("/v1/documents", json={"documents": shelved}).status_code == 200
    asked = {"question": QUESTION, "filter": {"year": {"$gte": 2000}}}
    talk = {
        "model": "ragcache",
        "messages": [{"role": "user", "content": QUESTION}],
        "ragcache": {"filter": {"year": {"$lt": 2000}}},
    }
    try:
        for route, key in (("search", "data"), ("query", "passages")):
            found = ann.post(f"/v1/{route}", json=asked).json()[key]
            assert [p["document"] for p in found] == ["new"]
            words = ann.post(
                f"/v1/{route}", json={**asked, "filter": {}, "retrieval": "bm25", "top_k": 9}
            )
            assert {p["document"] for p in words.json()[key]} >= {"new", "old"}
            none = ann.post(f"/v1/{route}", json={**asked, "min_score": 1, "mmr": 0.5})
            assert none.json()[key] == []
        report = ann.post("/v1/chat/completions", json=talk).json()["ragcache"]
        assert [c["id"] for c in report["chunks"]] == ["old#0"]
        nothing = ann.post("/v1/search", json={**asked, "filter": {"year": 1}}).json()
        assert nothing["data"] == [] and "with the filter" in nothing["no_chunks"]
        refused = ann.post("/v1/query", json={**asked, "filter": {"year": {"$from": 1}}})
        assert refused.status_code == 400
        assert "filter.year.$from is no operator" in refused.json()["error"]["message"]
        absent = ann.post("/v1/query", json={**asked, "rerank": 5})
        assert absent.status_code == 400 and "no reranker" in absent.json()["error"]["message"]
        little = ann.post("/v1/search", json={**asked, "filter": {}, "top_tokens": 1}).json()
        assert little["data"] == [] and "with the filter and top_tokens 1" in little["no_chunks"]
        wrong = ann.post("/v1/search", json={**asked, "retrieval": "sparse", "mmr": 2})
        assert wrong.status_code == 400 and "retrieval" in wrong.json()["error"]["message"]
        deep: Any = 1
        for _ in range(900):
            deep = [deep]
        nested = ann.post("/v1/search", json={**asked, "filter": {"n": deep}})
        assert nested.status_code == 400
        both = ann.post("/v1/chat/completions", json={**talk, "documents": ["Mira left."]})
        assert both.status_code == 400
        assert "leave out the filter or the chunks" in both.json()["error"]["message"]
    finally:
        for one in shelved:
            ann.delete(f"/v1/documents/{one['id']}")


def test_a_streamed_answer_is_the_whole_one_in_pieces(ann: httpx.Client) -> None:
    whole = ann.post("/v1/query", json={"question": QUESTION}).json()
    *pieces, last, done = events(ann.post("/v1/query", json={"question": QUESTION, "stream": True}))
    assert done == "[DONE]" and last["answer"] == whole["answer"]
    assert "".join(piece["delta"] for piece in pieces) == whole["answer"]


def test_a_chat_has_openais_shape(running: Served, ann: httpx.Client) -> None:
    given: Any = {
        "documents": ["Mira Holt lives in Oslo."],
        "ragcache": {"misses": "consistent"},  # the first answer is that of the second request
    }
    whole = chat(ann, **given).json()
    running.settle()
    assert whole["object"] == "chat.completion" and len(whole["ragcache"]["chunks"]) == 1
    usage = {"include_usage": True}
    streamed = chat(ann, **given, stream=True, stream_options=usage)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    first, *_, last, counted, done = events(streamed)
    assert done == "[DONE]" and first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["ragcache"]["chunks"][0]["miss"] is None and last["usage"] is None
    assert counted["choices"] == [] and counted["usage"]["total_tokens"] > 0
    said = [e["choices"][0]["delta"].get("content", "") for e in events(streamed)[:-2]]
    assert "".join(said) == whole["choices"][0]["message"]["content"]
    assert not any("usage" in e for e in events(chat(ann, stream=True))[:-1])


def test_the_same_text_is_one_chunk_however_it_comes(running: Served, ann: httpx.Client) -> None:
    text = "Corvex Mills makes clocks in Bexley."
    shapes: list[Any] = [
        text,
        {"text": text},
        {"id": "a", "data": text},
        {"id": "b", "data": {"snippet": text}},
        {"page_content": text},
    ]
    chat(ann, documents=[text])
    running.settle()
    found = chat(ann, documents=shapes).json()["ragcache"]["chunks"]
    assert [chunk["miss"] for chunk in found] == [None] * 5
    assert [chunk["id"] for chunk in found][2:4] == ["a#2", "b#3"]
    parts = [{"type": "text", "text": text}, {"type": "text", "text": QUESTION}]
    assert [c["miss"] for c in chat(ann, parts).json()["ragcache"]["chunks"]] == [None]


TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": QUESTION},
]


def prompt_text(answer: dict[str, Any]) -> str:
    """The text of the prompt of an answer with a trace."""
    parts = answer["ragcache"]["prompt"]
    return "".join(text for part in parts for text, _ in part["tokens"])


def test_a_chat_is_rendered_by_the_models_template_as_it_is(ann: httpx.Client) -> None:
    found = chat(ann, TURNS, documents=[], ragcache={"trace": True}).json()
    rendered = f"Be brief.\n\nHello\nAnswer: Hi.\n\n{QUESTION}\nAnswer:"
    assert prompt_text(found) == f"<bos>{rendered}"
    bare = chat(ann, documents=[], ragcache={"trace": True}).json()
    assert prompt_text(bare) == f"<bos>{QUESTION}\nAnswer:"  # nothing is added


def test_a_content_may_be_texts_without_types(ann: httpx.Client) -> None:
    """As LangChain's messages have them: a tool's result of two strings."""
    plain, typed = ["One.", "Two."], [{"type": "text", "text": t} for t in ("One.", "Two.")]
    texts = []
    for content in (plain, typed, [plain[0], typed[1]]):
        turns = [*TURNS, {"role": "tool", "tool_call_id": "1", "content": content}]
        found = chat(ann, turns, documents=[], ragcache={"trace": True}).json()
        texts.append(prompt_text(found))
    assert "One.\nTwo." in texts[0] and len(set(texts)) == 1


def test_documents_stand_where_the_request_says(ann: httpx.Client) -> None:
    given: Any = {"documents": ["It rains."], "ragcache": {"trace": True}}
    before = chat(ann, TURNS, **given).json()
    assert f"Hi.\n\nIt rains.\n\n{QUESTION}" in prompt_text(before)
    given["ragcache"]["documents_in"] = "system"
    assert "Be brief.\n\nIt rains.\n\nHello" in prompt_text(chat(ann, TURNS, **given).json())
    kinds = [part["kind"] for part in before["ragcache"]["prompt"]]
    assert kinds == [*["prefix"] * (len(kinds) - 2), "chunk", "question"]
    given["ragcache"] |= {"instructions": "Be kind.", "documents_in": "user"}
    assert "Be kind.\n\nIt rains." in prompt_text(chat(ann, **given).json())


def test_numbers_that_are_none_are_refused(ann: httpx.Client) -> None:
    schema = '{"type": "json_schema", "json_schema": {"schema": {"minimum": 1e999}}}'
    body = f'{{"question": "{QUESTION}", "response_format": {schema}}}'
    headers = {"content-type": "application/json"}
    refused = ann.post("/v1/query", content=body, headers=headers)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format"


def test_an_answer_follows_a_schema(ann: httpx.Client) -> None:
    schema = {"enum": [{"city": "Oslo"}, {"city": "Bergen"}]}
    form = {"type": "json_schema", "json_schema": {"name": "home", "schema": schema}}
    given = {"response_format": form, "max_tokens": 60}
    found = chat(ann, **given).json()["choices"][0]
    assert json.loads(found["message"]["content"]) in schema["enum"]
    assert found["finish_reason"] == "stop"
    answer = ann.post("/v1/query", json={"question": QUESTION, **given}).json()["answer"]
    assert json.loads(answer) in schema["enum"]
    text = chat(ann, response_format={"type": "text"}).json()
    assert text["choices"] == chat(ann).json()["choices"]
    begun = chat(ann, response_format={"type": "json_object"}, max_tokens=2).json()
    assert begun["choices"][0]["message"]["content"].startswith("{")
    assert begun["choices"][0]["finish_reason"] == "length"


def test_an_answer_that_has_begun_is_continued(ann: httpx.Client) -> None:
    begun = [*TURNS, {"role": "assistant", "content": "She lives in"}]
    found = chat(ann, begun, documents=[], ragcache={"trace": True}).json()
    assert prompt_text(found).endswith(f"{QUESTION}\nAnswer: She lives in")


def test_a_template_is_only_taken_where_the_service_trusts_requests(ann: httpx.Client) -> None:
    refused = chat(ann, ragcache={"template": "{{ messages[0].content }}"})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "ragcache.template"
    assert "--trust-request-templates" in error["message"]


def test_chunks_are_looked_for_where_none_are_given(ann: httpx.Client) -> None:
    assert chat(ann).json()["ragcache"]["passages"]
    assert not chat(ann, documents=[]).json()["ragcache"]["passages"]
    assert not chat(ann, ragcache={"retrieve": False}).json()["ragcache"]["passages"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 2}, None, "n is not supported"),
        ({"logprobs": True}, None, "logprobs is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format is one of"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": HUGE}}},
            None,
            "number out of range",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}},
            None,
            "answers cannot be made to follow this JSON schema",
        ),
        ({"colour": "red"}, "colour", "this field is unknown"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"ragcache": {"ratio": 1.5}}, "ragcache.ratio", "less than or equal to 1"),
        ({"documents": [{"text": {"a": 1}}]}, "documents.0.text", "may only have text and numbers"),
        ({"documents": [{"id": "a"}]}, "documents.0", "has no text"),
        ({"ragcache": {"mode": "blend"}}, None, "mode 'blend' is unknown"),
        ({"ragcache": {"retrieve": True}, "documents": ["a"]}, "ragcache.retrieve", "without doc"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": " "}]}, None, "the last message is empty"),
        ({"messages": [{"role": "system", "content": "a"}]}, None, "no message of a user or tool"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role", "'user'"),
        ({"stop": ["a"] * 17}, "stop", "17 texts are more than the limit of 16"),
        ({"stop": [""]}, "stop", "1 to 1000 characters"),
        ({"stop": [1]}, "stop", "a list of texts"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is not supported"),
        ({"logprobs": True}, "logprobs", "logprobs is not supported"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages.0.content",
            "the message has no content",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "the message has no content"),
        ({"documents": [1]}, "documents.0", "valid string"),
        ({"documents": [{"title": None}]}, "documents.0", "documents.0 has no text"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "valid string"),
        (
            {"messages": [{"role": "user", "content": ["a"] * 10_001}]},
            "messages.0.content",
            "at most 10000 items",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages.0.content.0", "dictionary"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
            "'image_url' are not supported",
        ),
    ],
)
def test_what_cannot_be_is_said(
    ann: httpx.Client, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = ann.post(
        "/v1/chat/completions",
        json={"model": "ragcache", "messages": [{"role": "user", "content": "Who?"}], **fields},
    )
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert message in error["message"] and (param is None or error["param"] == param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_context_that_is_too_small_is_said_with_the_numbers(
    ann: httpx.Client, stream: bool
) -> None:
    response = chat(ann, documents=["One.", "word and " * 400, "Two."], stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "context of 512" in error["message"] and "'documents#1'" in error["message"]
    need, _, inside, _, texts, room, *_ = map(int, re.findall(r"\b\d+\b", error["message"]))
    assert need == inside + texts + room


def test_another_model_is_not_found(ann: httpx.Client) -> None:
    body = {"model": "gpt-5", "messages": [{"role": "user", "content": "Who?"}]}
    response = ann.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    [model] = ann.get("/v1/models").json()["data"]
    assert ann.get(f"/v1/models/{model['id']}").json() == model


def test_what_openai_takes_is_taken(ann: httpx.Client) -> None:
    """A stop that is null or one text, a document without a title, an assistant's empty turn."""
    plain = chat(ann, documents=[{"text": "A text."}]).json()
    untitled = chat(ann, documents=[{"title": None, "text": "A text.", "url": None}]).json()
    assert untitled["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    for stop in (None, "x", ["x"] * 16):
        assert chat(ann, stop=stop).status_code == 200
    turns = [
        {"role": "assistant", "content": "", "tool_calls": None, "refusal": None},
        {"role": "user", "content": QUESTION},
    ]
    assert chat(ann, turns).status_code == 200


def test_what_would_be_loaded_is_said_without_an_answer(running: Served, ann: httpx.Client) -> None:
    asked = {"question": QUESTION, "mode": "reuse"}
    said = ann.post("/v1/explain", json=asked).json()
    answered = ann.post("/v1/query", json=asked).json()["ragcache"]
    assert said["object"] == "ragcache.explanation" and said["mode"] == "reuse"
    assert said["parts"] == answered["parts"] and said["passages"] == answered["passages"]
    assert said["tokens"] == sum(part["tokens"] for part in said["parts"])
    assert said["loaded"] == answered["reused_tokens"] + answered["loaded_text_tokens"] > 0
    body = {"model": "ragcache", "messages": TURNS, "documents": ["Never seen by this service."]}
    chunk = next(p for p in explain(ann, body).json()["parts"] if p["kind"] == "chunk")
    assert (chunk["loaded"], chunk["reason"]) == (0, "never seen before")
    chat(ann, TURNS, documents=body["documents"])
    running.settle()
    again = next(p for p in explain(ann, body).json()["parts"] if p["kind"] == "chunk")
    assert (again["loaded"], again["reason"]) == (again["tokens"], "")


def explain(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/explain", json=body)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"question": " "}, None, "the question is empty"),
        ({"question": "Who?", "colour": 1}, "colour", "this field is unknown"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": "Who?"}], "n": 2}, None, "n is not supported"),
    ],
)
def test_what_cannot_be_explained(
    ann: httpx.Client, body: dict[str, Any], param: str | None, message: str
) -> None:
    model = {"model": "ragcache"} if "messages" in body else {}
    response = explain(ann, {**model, **body})
    error = response.json()["error"]
    assert response.status_code == 400 and message in error["message"]
    assert param is None or error["param"] == param


def test_a_trace_has_every_part_in_order(running: Served, ann: httpx.Client) -> None:
    """Texts that stand between chunks, such as what a message says between two given texts."""
    text = "The mill in Bexley grinds no more, and its wheel stands still. " * 8
    messages = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("It rains.", "Where?")]},
        {"role": "assistant", "content": "In Oslo."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in (text, QUESTION)]},
    ]
    found = chat(ann, messages, ragcache={"trace": True, "mode": "reuse"}).json()
    parts = found["ragcache"]["prompt"]
    assert [part["kind"] for part in parts] == ["prefix", "chunk", "text", "chunk", "question"]
    middle = "Where?\nAnswer: In Oslo.\n\n"
    assert "".join(piece for piece, _ in parts[2]["tokens"]) == middle
    assert prompt_text(found) == (
        f"<bos>It rains.\n\n{middle}{text.strip()}\n\n{QUESTION}\nAnswer:"
    )
    assert [part["name"] for part in parts][2:] == ["text 2", "message 2#1", "question"]
