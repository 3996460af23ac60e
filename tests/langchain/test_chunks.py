"""Chunk boundaries are kept on every path from retriever to model.

What is looked at is the report: chunks whose boundaries were lost would not be found in the store.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumps, loads
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
)
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.tools import create_retriever_tool

from ragcache.langchain import ChatRagCache, RagCacheRetriever, rag_messages
from ragcache.rag import RagCache
from tests.langchain.conftest import DOCUMENTS, PLACES, QUESTION

pytestmark = pytest.mark.parametrize("place", PLACES, indirect=True, scope="module")
TEXTS = [document.page_content for document in DOCUMENTS]
ASKED = rag_messages(QUESTION, DOCUMENTS)


@pytest.fixture
def model(place: dict[str, Any]) -> ChatRagCache:
    return ChatRagCache(**place)


CHUNKS = [{"type": "chunk", "text": text} for text in TEXTS]
OWN = [{"role": "user", "content": [*TEXTS, QUESTION]}]


def check(
    answer: BaseMessage, cache: RagCache, way: str = "content blocks", messages: Any = OWN
) -> None:
    """All chunks were found in the store, and the answer is RagCache's own to ``messages``."""
    report = answer.response_metadata["ragcache"]
    assert report["boundaries"] == [way]
    assert [chunk["miss"] for chunk in report["chunks"]] == [None] * len(DOCUMENTS)
    own = cache.ask(messages=messages, chunks=[])
    assert report["reused_tokens"] == own.report.reused_tokens > 0
    assert answer.text == own.text


def summed(pieces: list[AIMessageChunk]) -> AIMessageChunk:
    first, *others = pieces
    return first.__add__(others)


def test_invoke(model: ChatRagCache, cache: RagCache) -> None:
    answer = model.invoke(ASKED)
    check(answer, cache)
    named = [chunk["id"] for chunk in answer.response_metadata["ragcache"]["chunks"]]
    assert named == [document.id for document in DOCUMENTS]


def test_stream(model: ChatRagCache, cache: RagCache) -> None:
    pieces = list(model.stream(ASKED))
    assert len(pieces) > 2
    check(summed(pieces), cache)


def test_batch(model: ChatRagCache, cache: RagCache) -> None:
    for answer in model.batch([ASKED] * 4):
        check(answer, cache)


def test_async(model: ChatRagCache, cache: RagCache) -> None:
    async def ask() -> list[BaseMessage]:
        streamed = summed([piece async for piece in model.astream(ASKED)])
        return [streamed, await model.ainvoke(ASKED), *await model.abatch([ASKED] * 3)]

    for answer in asyncio.run(ask()):
        check(answer, cache)


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_serialisation(model: ChatRagCache, cache: RagCache) -> None:
    check(model.invoke(loads(dumps(ASKED), allowed_objects="core")), cache)


def test_a_placeholder(model: ChatRagCache, cache: RagCache) -> None:
    documents = [HumanMessage(ASKED[0].content[:-1])]  # blocks alone, before the question
    prompt = ChatPromptTemplate([MessagesPlaceholder("found"), ("human", "{question}")])
    own = [{"role": "user", "content": CHUNKS}, {"role": "user", "content": QUESTION}]
    answer = (prompt | model).invoke({"found": documents, "question": QUESTION})
    check(answer, cache, messages=own)


@pytest.mark.parametrize(
    "documents",
    [
        DOCUMENTS,
        TEXTS,
        [{"id": d.id, "text": d.page_content} for d in DOCUMENTS],
        [{"page_content": d.page_content} for d in DOCUMENTS],
    ],
)
def test_documents_at_call_and_bind(
    model: ChatRagCache, cache: RagCache, documents: list[Any]
) -> None:
    check(model.invoke(QUESTION, documents=documents), cache, "documents")
    bound = model.bind(documents=documents)
    check(bound.invoke(QUESTION), cache, "documents")
    check(summed(list(bound.stream(QUESTION))), cache, "documents")


def test_retriever_and_model_of_one_place(
    place: dict[str, Any], model: ChatRagCache, cache: RagCache
) -> None:
    own = RagCacheRetriever(store=cache, k=3).invoke(QUESTION)
    retriever = RagCacheRetriever(**place, k=3)
    assert retriever.invoke(QUESTION) == own == asyncio.run(retriever.ainvoke(QUESTION))
    assert retriever.invoke(QUESTION, k=1, neighbours=0) == own[:1]
    answer = model.invoke(rag_messages(QUESTION, retriever.invoke(QUESTION)))
    content = [*(document.page_content for document in own), QUESTION]
    messages = [{"role": "user", "content": content}]
    assert answer.text == cache.ask(messages=messages, chunks=[]).text
    report = answer.response_metadata["ragcache"]
    assert [chunk["id"] for chunk in report["chunks"]] == [document.id for document in own]
    assert [chunk["miss"] for chunk in report["chunks"]] == [None] * len(own)


def test_a_tools_artifact(model: ChatRagCache, cache: RagCache) -> None:
    tool = create_retriever_tool(
        RagCacheRetriever(store=cache, k=3),
        "notes",
        "Search the notes.",
        response_format="content_and_artifact",
    )
    call = {"name": "notes", "args": {"query": "Mira Holt"}, "id": "1", "type": "tool_call"}
    result = tool.invoke(call)
    result.artifact.sort(key=lambda d: TEXTS.index(d.page_content))
    asked = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), result]
    own = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": CHUNKS},
    ]
    check(model.invoke(asked), cache, "tool artifacts", own)
    result.artifact = [json.loads(document.model_dump_json()) for document in result.artifact]
    check(model.invoke(asked), cache, "tool artifacts", own)


def test_several_text_parts(model: ChatRagCache, cache: RagCache) -> None:
    parts: list[str | dict[str, Any]] = [{"type": "text", "text": t} for t in [*TEXTS, QUESTION]]
    check(model.invoke([HumanMessage(parts)]), cache, "text parts")


@pytest.mark.parametrize("joined", ["{0}\n\n{1}\n\n{2}\n\n{q}", "- {0}\n- {1}\n- {2}\n{q}"])
def test_a_joined_string_is_matched_and_the_report_says_so(
    model: ChatRagCache, joined: str
) -> None:
    answer = model.invoke(joined.format(*TEXTS, q=QUESTION))
    report = answer.response_metadata["ragcache"]
    assert report["boundaries"] == ["matched text"]
    assert [chunk["miss"] for chunk in report["chunks"]] == [None] * 3
    assert [chunk["id"] for chunk in report["chunks"]] == ["holt#0", "mill#0", "boats#0"]


def test_a_chunk_that_nobody_knows_is_stored_with_its_first_question(model: ChatRagCache) -> None:
    text = f"A heron nests on the roof of {type(model.backend).__name__}."
    misses: list[str | None] = []
    while None not in misses and len(misses) < 20:  # a service stores it behind the answer
        report = model.invoke(QUESTION, documents=[text]).response_metadata["ragcache"]
        misses.append(report["chunks"][0]["miss"])
    assert misses[0] == "absent" and misses[-1] is None
    assert report["reused_tokens"] > 0


def test_any_retriever_may_stand_in_front(model: ChatRagCache, cache: RagCache) -> None:
    found = [Document(text) for text in TEXTS]  # without ids, as some retrievers give them
    check(model.invoke(rag_messages(QUESTION, found)), cache)
