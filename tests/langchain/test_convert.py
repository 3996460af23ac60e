"""Messages as in OpenAI's API: every text in its place, and chunks where they stand."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from ragcache.errors import PromptError
from ragcache.langchain import rag_messages
from ragcache.langchain.convert import InputChunk, convert_messages
from tests.langchain.conftest import DOCUMENTS, QUESTION

TEXTS = [document.page_content for document in DOCUMENTS]
CHUNKS = [{"type": "chunk", "text": d.page_content, "id": d.id} for d in DOCUMENTS]
ASKED = rag_messages(QUESTION, DOCUMENTS)


def text(given: str) -> dict[str, str]:
    return {"type": "text", "text": given}


def test_every_message_stays_as_it_is() -> None:
    call = {"name": "sum", "args": {"of": [40, 2]}, "id": "1", "type": "tool_call"}
    wrong = {"name": "sum", "args": "{", "id": "2", "error": "", "type": "invalid_tool_call"}
    given: list[BaseMessage] = [
        SystemMessage("Be brief.\n"),
        SystemMessage("Be kind.", additional_kwargs={"__openai_role__": "developer"}),
        HumanMessage(" Hello", name="ann"),
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Hi!"}]),
        AIMessage("", tool_calls=[call], invalid_tool_calls=[wrong]),
        ToolMessage("42", tool_call_id="1", name="sum"),
        ChatMessage(content="Order!", role="judge"),
        *ASKED,
        AIMessage("In"),
    ]
    converted = convert_messages(given)
    *_, called = [m for m in converted.messages if "tool_calls" in m]
    functions = [call["function"] for call in called["tool_calls"]]
    assert functions == [
        {"name": "sum", "arguments": json.dumps({"of": [40, 2]})},
        {"name": "sum", "arguments": "{"},
    ]
    assert [{k: v for k, v in m.items() if k != "tool_calls"} for m in converted.messages] == [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "name": "ann", "content": " Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "tool_call_id": "1", "name": "sum", "content": "42"},
        {"role": "judge", "content": "Order!"},
        {"role": "user", "content": [*CHUNKS, text(QUESTION)]},
        {"role": "assistant", "content": "In"},
    ]
    assert (converted.chunks, converted.sources) == (len(CHUNKS), ("content blocks",))


def test_chunks_stay_where_they_stand() -> None:
    blocks = [{"type": "text-plain", "text": t} for t in TEXTS]
    content: Any = ["Notes:", blocks[0], "More notes:", blocks[1], blocks[1], "Why?"]
    chunks = [{"type": "chunk", "text": t} for t in TEXTS]
    expected = [text("Notes:"), chunks[0], text("More notes:"), chunks[1], chunks[1], text("Why?")]
    for message in (HumanMessage(content), SystemMessage(content), AIMessage(content)):
        converted = convert_messages([message])
        assert converted.messages[0]["content"] == expected
        assert converted.chunks == 3


def test_a_text_that_is_repeated_among_documents_is_one_chunk() -> None:
    given = [*DOCUMENTS, Document(f" {TEXTS[0]}\n"), TEXTS[1], ""]
    assert rag_messages(QUESTION, [*DOCUMENTS, TEXTS[0]]) == ASKED
    converted = convert_messages([HumanMessage(QUESTION)], given)
    assert [chunk.id for chunk in converted.documents] == [d.id for d in DOCUMENTS]
    assert (converted.chunks, converted.blank) == (len(DOCUMENTS), 1)
    tool = ToolMessage("found", tool_call_id="1", artifact=[*DOCUMENTS, DOCUMENTS[0]])
    assert convert_messages([tool]).messages[0]["content"] == CHUNKS


def test_artifacts_that_are_no_documents_leave_the_text() -> None:
    for artifact in (None, [], [1], {"page_content": "a"}, "text"):
        tool = ToolMessage("found", tool_call_id="1", artifact=artifact)
        converted = convert_messages([tool])
        assert converted.messages[0]["content"] == "found"
        assert converted.sources == ()


def test_all_but_the_last_of_several_texts_are_chunks() -> None:
    content: Any = [*TEXTS, QUESTION]
    converted = convert_messages([HumanMessage(content), SystemMessage(content)])
    assert converted.messages[0]["content"] == [text(each) for each in content]
    assert (converted.chunks, converted.sources) == (len(TEXTS), ("text parts",))
    blank: Any = [{"type": "text-plain", "text": " "}, *content]
    converted = convert_messages([HumanMessage(blank)])
    assert (converted.chunks, converted.blank) == (len(TEXTS), 1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "image", "url": "https://x.test/a.png"}], "type 'image'"),
        ([{"type": "text-plain", "url": "https://x.test/a.txt"}], "URLs and files are not read"),
        ([{"type": "text-plain", "base64": "?"}], "is not text"),
    ],
)
def test_what_cannot_be_read_is_refused(content: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        convert_messages([HumanMessage(content)])


def test_a_message_without_a_role_is_refused() -> None:
    with pytest.raises(PromptError, match="a RemoveMessage, which has no role"):
        convert_messages([RemoveMessage("1")])


def test_base64_is_text_too() -> None:
    block = {"type": "text-plain", "base64": base64.b64encode(b"In Oslo.").decode()}
    (message,) = convert_messages([HumanMessage([block, text("Where?")])]).messages
    assert message["content"] == [{"type": "chunk", "text": "In Oslo."}, text("Where?")]


def test_documents_must_be_documents() -> None:
    with pytest.raises(PromptError, match="int is not a document"):
        convert_messages([HumanMessage("Why?")], [3])


def test_reports_have_the_callers_ids() -> None:
    blocks = [{"type": "text-plain", "text": "a", "id": id} for id in ("holt", "holt#3")]
    converted = convert_messages([HumanMessage([*blocks, "?"])], [Document("b", id="mill"), "c"])
    assert converted.documents == (InputChunk("b", "mill"), InputChunk("c"))
    assert converted.ids() == {"holt#0": "holt", "mill#0": "mill"}


def test_rag_messages_take_a_mapping() -> None:
    history: list[BaseMessage] = [HumanMessage("Hello"), AIMessage("Hi!")]
    made = rag_messages({"question": QUESTION, "documents": DOCUMENTS, "history": history})
    assert made == [*history, *ASKED]
    assert made[-1].content[0]["title"] == "holt"  # type: ignore[index]
    with pytest.raises(PromptError, match="no question"):
        rag_messages({"documents": DOCUMENTS})
