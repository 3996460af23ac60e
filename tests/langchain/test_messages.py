"""What is read from messages: a question, chunks, and other turns."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from ragcache.errors import PromptError
from ragcache.langchain import rag_messages
from ragcache.langchain.chunk_parsing import ContextMessage, InputChunk, parse_messages
from ragcache.retriever.known_texts import KnownTexts
from tests.langchain.conftest import DOCUMENTS, QUESTION

TEXTS = [document.page_content for document in DOCUMENTS]
ASKED = rag_messages(QUESTION, DOCUMENTS)


def test_what_was_said_besides_is_asked_too() -> None:
    turn = parse_messages(
        [
            SystemMessage("Be brief."),
            HumanMessage("Hello", name="ann"),
            AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Hi!"}]),
            ToolMessage("42", tool_call_id="1", name="sum"),
            *ASKED,
        ]
    )
    said = "Be brief.\nUser ann: Hello\nAssistant: Hi!\nTool sum: 42"
    assert turn.text == f"{said}\n\n{QUESTION}"
    assert [chunk.text for chunk in turn.chunks] == TEXTS


def test_the_same_text_is_taken_once() -> None:
    turn = parse_messages(rag_messages(QUESTION, [*DOCUMENTS, TEXTS[0]]), [TEXTS[1]])
    assert [chunk.id for chunk in turn.chunks] == [document.id for document in DOCUMENTS]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "image", "url": "https://x.test/a.png"}], "type 'image'"),
        ([{"type": "text-plain", "url": "https://x.test/a.txt"}], "URLs and files are not read"),
        ([{"type": "text-plain", "base64": "?"}], "is not text"),
        ([{"type": "text-plain", "text": "alone"}], "no question"),
        ("  ", "no question"),
    ],
)
def test_what_cannot_be_read_is_refused(content: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        print(parse_messages([HumanMessage(content)]).text)


def test_base64_is_text_too() -> None:
    block = {"type": "text-plain", "base64": base64.b64encode(b"In Oslo.").decode()}
    turn = parse_messages([HumanMessage([block, {"type": "text", "text": "Where?"}])])
    assert (turn.chunks, turn.text) == ((InputChunk("In Oslo."),), "Where?")


def test_matching_takes_the_longest_and_leaves_the_rest() -> None:
    short, long = "Mira Holt keeps a parrot.", "Mira Holt keeps a parrot. It speaks."
    known = KnownTexts((text, "") for text in (short, long, "too short"))
    asked = HumanMessage(f"Notes:\n\n{long}\n\n{short}\n\ntoo short\n\nWhy?")
    turn = parse_messages([asked]).match_known(known)
    assert [chunk.text for chunk in turn.chunks] == [long, short]
    assert turn.question == "Notes:\n\ntoo short\n\nWhy?"
    turn = parse_messages([SystemMessage(f"Notes: {long}"), HumanMessage("Why?")]).match_known(
        known
    )
    assert turn.context == (ContextMessage("", "Notes:"),)


def test_documents_must_be_documents() -> None:
    with pytest.raises(PromptError, match="int is not a document"):
        parse_messages([HumanMessage("Why?")], [3])


def test_rag_messages_take_a_mapping() -> None:
    history: list[BaseMessage] = [HumanMessage("Hello"), AIMessage("Hi!")]
    made = rag_messages({"question": QUESTION, "documents": DOCUMENTS, "history": history})
    assert made == [*history, *ASKED]
    assert made[-1].content[0]["title"] == "holt"  # type: ignore[index]
    with pytest.raises(PromptError, match="no question"):
        rag_messages({"documents": DOCUMENTS})
