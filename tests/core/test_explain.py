"""What would be loaded for a request is said without answering, with reasons in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ragcache.core.request import Request
from ragcache.errors import PromptError
from ragcache.rag import RagCache
from ragcache.types import PartReport
from tests import scene

TEXT = "Corvex Mills makes clocks in Bexley, and it has made them there for a hundred years."
CHAT: list[dict[str, str]] = [
    {"role": "system", "content": "Be brief, and answer in one sentence of English, please."},
    {"role": "user", "content": "Who makes clocks?"},
]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path, chat_bytes=0) as cache:
        yield cache


def chat(text: str = TEXT, messages: Any = CHAT, **options: Any) -> Request:
    return Request(messages=messages, chunks=[text], **options)


def parts(cache: RagCache, request: Request) -> list[PartReport]:
    found = cache.explain(request).parts
    return list(found)


def test_it_says_what_the_answer_then_reports(cache: RagCache) -> None:
    for loaded in (False, True):
        before = cache.store.stats()
        explained = cache.explain(chat())
        assert cache.store.stats() == before  # nothing is counted or stored
        answer = cache.generate(chat()).answer
        assert answer.report.parts == explained.parts
        assert explained.tokens == answer.report.prompt_tokens == len(answer.prompt)
        kinds = [(part.kind, part.name, part.loaded > 0) for part in explained.parts]
        first = ("text", "instructions", loaded) if len(kinds) == 3 else ("text", "text 1", loaded)
        assert kinds[0] == first and ("chunk", "given#0", loaded) in kinds
        assert kinds[-1] == ("text", "question", False)
    assert explained.mode == answer.report.mode
    assert answer.report.cached_tokens <= explained.loaded < explained.tokens
    assert cache.explain(chat(mode="full")).loaded == 0


def test_the_reason_of_a_miss(cache: RagCache) -> None:
    def reason(request: Request) -> str:
        (chunk,) = [part for part in cache.explain(request).parts if part.kind == "chunk"]
        return chunk.reason

    assert reason(chat()) == "never seen before"
    cache.generate(chat()).answer  # noqa: B018
    assert reason(chat()) == ""
    edited = reason(chat(TEXT.replace("a hundred", "two hundred")))
    assert "differs from a part seen before at token" in edited
    assert edited.endswith("('re for two hu' was 're for a hundr')")
    assert "mode full loads nothing" in reason(chat(mode="full"))
    key = cache.indexing.key_of(cache.prompt(chat()).chunks[0])
    cache.generate(chat()).answer  # noqa: B018
    cache.chunks.delete(key)
    assert reason(chat()) == "evicted or deleted: it was stored before"


def test_an_indexed_chunk_that_is_not_stored_was_evicted(cache: RagCache) -> None:
    cache.add(scene.DOCUMENTS)
    asked = Request("Who keeps a parrot?")
    assert all(p.loaded for p in cache.explain(asked).parts if p.kind == "chunk")
    for entry in cache.documents():
        for key in cache.indexing.keys(entry.id):
            cache.chunks.delete(key)
    missing = [part for part in cache.explain(asked).parts if part.kind == "chunk"]
    assert missing and all("text of an indexed document" in part.reason for part in missing)


def test_an_edited_system_message_is_said(cache: RagCache) -> None:
    cache.generate(chat()).answer  # noqa: B018
    other = [{**CHAT[0], "content": CHAT[0]["content"].replace("please", "now")}, CHAT[1]]
    first = cache.explain(chat(messages=other)).parts[0]
    assert first.kind == "text" and not first.loaded
    assert first.reason.startswith("edited: differs from a part seen before at token")


def test_other_messages_in_between(cache: RagCache) -> None:
    turns = [CHAT[0], {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    request = chat(messages=[*turns, CHAT[1]])
    reasons = [part.reason for part in parts(cache, request) if part.kind == "text"]
    assert reasons[0] == "never seen before"
    assert reasons[1:-1] == ["a part before it is not stored"] * len(reasons[1:-1])
    assert reasons[-1] == "the last part of a prompt is always computed"
    cache.generate(request).answer  # noqa: B018
    *earlier, chunk, question = parts(
        cache, chat(messages=[*turns, {**CHAT[1], "content": "Why?"}])
    )
    assert all(part.loaded for part in (*earlier, chunk)) and not question.loaded


def test_a_chat_without_a_question_is_refused(cache: RagCache) -> None:
    with pytest.raises(PromptError, match="the last message is empty"):
        cache.explain(Request(messages=[{"role": "user", "content": " "}]))
