"""The prompt of messages is what the model's chat template makes of them, to the character."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from pydantic import SecretStr

from ragcache.core.prompting import BuiltPrompt, PromptBuilder
from ragcache.errors import PromptError
from ragcache.langchain import ChatRagCache, RagCacheMessageChunk, rag_messages
from ragcache.rag import RagCache
from tests import models, scene
from tests.api.conftest import ANN, served
from tests.langchain.conftest import DOCUMENTS, PLACES, QUESTION

both_places = pytest.mark.parametrize("place", PLACES, indirect=True, scope="module")

TEXTS = [document.page_content for document in DOCUMENTS]
CONTEXT = "\n\n".join(TEXTS)
CHUNKS = "".join(f"{text}\n\n" for text in TEXTS)
#: Like ChatML, with names and tool calls.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}]\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}[end]\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
CALL = {"name": "notes", "args": {"query": "Mira Holt"}, "id": "1", "type": "tool_call"}
FUNCTION = {"name": "notes", "arguments": {"query": "Mira Holt"}}


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


#: LangChain's messages, options of the call, and the messages as the template gets them.
CASES: dict[str, tuple[Sequence[Any], dict[str, Any], list[dict[str, Any]]]] = {
    "context in the system message": (
        ChatPromptTemplate.from_messages(
            [("system", "Answer from the notes.\n{context}\nBe brief."), ("human", "{question}")]
        ).format_messages(context=CONTEXT, question=QUESTION),
        {},
        [
            message("system", f"Answer from the notes.\n{CONTEXT}\nBe brief."),
            message("user", QUESTION),
        ],
    ),
    "context in the question": (
        ChatPromptTemplate.from_messages(
            [("system", "Be brief. "), ("human", "Notes:\n{context}\n\nQuestion: {question}")]
        ).format_messages(context=CONTEXT, question=QUESTION),
        {},
        [
            message("system", "Be brief. "),
            message("user", f"Notes:\n{CONTEXT}\n\nQuestion: {QUESTION}"),
        ],
    ),
    "three turns": (
        [
            SystemMessage("Be brief."),
            *rag_messages("Who has a bird?", DOCUMENTS[:1]),
            AIMessage("Mira  Holt."),
            HumanMessage(" Which one?\n", name="ann"),
            AIMessage("A parrot."),
            HumanMessage(QUESTION),
        ],
        {"documents": DOCUMENTS[1:]},
        [
            message("system", "Be brief."),
            message("user", f"{TEXTS[0]}\n\nWho has a bird?"),
            message("assistant", "Mira  Holt."),
            message("user", " Which one?\n", name="ann"),
            message("assistant", "A parrot."),
            message("user", f"{TEXTS[1]}\n\n{TEXTS[2]}\n\n{QUESTION}"),
        ],
    ),
    "a tool call": (
        [
            HumanMessage(QUESTION),
            AIMessage("I look.", tool_calls=[CALL]),
            ToolMessage("found", tool_call_id="1", name="notes", artifact=DOCUMENTS),
            ToolMessage("42", tool_call_id="2"),
        ],
        {},
        [
            message("user", QUESTION),
            message("assistant", "I look.", tool_calls=[{"function": FUNCTION}]),
            message("tool", CHUNKS, name="notes"),
            message("tool", "42"),
        ],
    ),
    "blocks between texts": (
        [
            HumanMessage(
                [
                    "Notes:",
                    {"type": "text-plain", "text": TEXTS[0]},
                    {"type": "text-plain", "text": f"\n{TEXTS[1]} "},
                    "Other notes:",
                    {"type": "text-plain", "text": TEXTS[2]},
                    {"type": "text", "text": QUESTION},
                ]
            )
        ],
        {},
        [
            message(
                "user",
                f"Notes:\n{TEXTS[0]}\n\n{TEXTS[1]}\n\nOther notes:\n{TEXTS[2]}\n\n{QUESTION}",
            )
        ],
    ),
    "instructions, and documents after them": (
        [HumanMessage(QUESTION)],
        {"instructions": "Be brief.\n\n", "documents_in": "system", "documents": DOCUMENTS},
        [message("system", f"Be brief.\n\n{CHUNKS}"), message("user", QUESTION)],
    ),
    "an answer to continue": (
        [*rag_messages(QUESTION, DOCUMENTS), AIMessage("She lives")],
        {},
        [message("user", CHUNKS + QUESTION), message("assistant", "She lives")],
    ),
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[BuiltPrompt]:
    """All prompts that this process makes, for either backend."""
    made: list[BuiltPrompt] = []
    build = PromptBuilder.build

    def recorded(*given: Any) -> BuiltPrompt:
        made.append(build(*given))
        return made[-1]

    monkeypatch.setattr(PromptBuilder, "build", recorded)
    return made


@both_places
@pytest.mark.parametrize("case", CASES)
def test_the_prompt_is_the_templates(
    place: dict[str, Any], cache: RagCache, built: list[BuiltPrompt], case: str
) -> None:
    messages, called, converted = CASES[case]
    given = list(messages)
    options = dict(called)
    model = ChatRagCache(**place, template=TEMPLATE)
    answer = model.invoke(given, **options)
    prompt = built[-1].prompt
    continued = converted[-1]["role"] == "assistant"
    expected = models.tokenizer().apply_chat_template(
        converted,
        chat_template=TEMPLATE,
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )
    assert "".join(cache.engine.pieces(prompt.tokens)) == expected
    report = answer.response_metadata["ragcache"]
    assert [chunk["miss"] for chunk in report["chunks"]] == [None] * len(DOCUMENTS)
    assert report["reused_tokens"] > 0
    texts = ["".join(cache.engine.pieces(chunk)).strip() for chunk in prompt.chunks]
    assert texts == TEXTS
    usage = answer.usage_metadata
    documents = options.pop("documents", None)
    counted = ChatRagCache(**place, template=TEMPLATE, **options)
    assert counted.get_num_tokens_from_messages(given, documents=documents) == len(prompt)
    assert usage and usage["input_tokens"] == len(prompt)
    streamed = sum(model.stream(given, **called), RagCacheMessageChunk(content=""))
    assert streamed.text == answer.text


@both_places
def test_the_context_of_a_users_own_template_is_reused(
    place: dict[str, Any], built: list[BuiltPrompt]
) -> None:
    """Also the parts of a context that the store has no documents of."""
    context = "\n\n".join(f"## Section {n}\n\n" + " ".join([models.TEXT[n]] * 9) for n in range(2))
    prompt = ChatPromptTemplate.from_template("Use the notes.\n\n{context}\n\n{question}")
    chain = prompt | ChatRagCache(**place, max_tokens=1)
    reports: list[dict[str, Any]] = []
    while len(reports) < 20:  # a service stores what it computed after the answer
        answer = chain.invoke({"context": context, "question": f"Question {len(reports)}?"})
        reports.append(answer.response_metadata["ragcache"])
        if not any(chunk["miss"] for chunk in reports[-1]["chunks"]):
            break
    first, *_, last = reports
    assert first["boundaries"] == last["boundaries"] == ["matched text"]
    assert {chunk["miss"] for chunk in first["chunks"]} == {"absent"}
    assert {chunk["miss"] for chunk in last["chunks"]} == {None}
    assert last["reused_tokens"] > 0.5 * last["chunk_tokens"] > 0
    assert "".join(map(str, built[-1].passages)).count("Section") == 2


@both_places
def test_the_callers_ids_are_in_the_report(place: dict[str, Any]) -> None:
    blocks = rag_messages(QUESTION, [DOCUMENTS[0], Document(TEXTS[1], id="mill#4")])
    answer = ChatRagCache(**place).invoke(blocks, documents=[DOCUMENTS[2], Document("A boat.")])
    report = answer.response_metadata["ragcache"]
    names = ["boats", "documents#1", "holt", "mill#4"]
    assert [chunk["id"] for chunk in report["chunks"]] == names
    assert [passage["id"] for passage in report["passages"]] == names


@both_places
def test_misses_and_finding_are_options(place: dict[str, Any]) -> None:
    text = f"A gull sits on the roof of the {'-'.join(place)}."
    model = ChatRagCache(**place, mode="reuse", misses="consistent", find_chunks=False)
    first = model.invoke(QUESTION, documents=[text])
    assert first.text == model.invoke(QUESTION, documents=[text]).text
    report = model.invoke(f"{CONTEXT}\n\n{QUESTION}").response_metadata["ragcache"]
    assert (report["chunks"], report["boundaries"]) == ([], [])
    found = model.invoke(f"{CONTEXT}\n\n{QUESTION}", find_chunks=True)
    assert len(found.response_metadata["ragcache"]["chunks"]) == len(TEXTS)


def test_a_stopped_stream_is_a_turn_of_its_chat(tmp_path: Path) -> None:
    asked = HumanMessage("Which of the birds by the sea is a parrot? " * 4)
    with scene.small(tmp_path) as cache:
        model = ChatRagCache(store=cache, max_tokens=200)
        stream = model.stream([asked])
        said = next(piece.text for piece in stream if piece.text)
        stream.close()  # type: ignore[attr-defined]
        answer = model.invoke([asked, AIMessage(said), HumanMessage(QUESTION)])
        usage = answer.usage_metadata
        assert usage and usage["input_token_details"]["cache_read"] >= len(
            cache.engine.tokenize(asked.text)
        )


def test_a_service_that_does_not_trust_templates(tmp_path: Path) -> None:
    with served(tmp_path) as one:
        model = ChatRagCache(base_url=f"{one.url}/v1", api_key=SecretStr(ANN), template=TEMPLATE)
        with pytest.raises(PromptError, match="--trust-request-templates"):
            model.invoke(QUESTION)


def test_openais_class_unchanged(running: str, cache: RagCache, built: list[BuiltPrompt]) -> None:
    """``langchain_openai.ChatOpenAI`` sends the same prompt, and reuses the same chunks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies, at import
        openai = pytest.importorskip("langchain_openai", reason="langchain-openai is missing")
    options: dict[str, Any] = {"base_url": running, "api_key": ANN, "model": "ragcache"}
    chat = openai.ChatOpenAI(**options, temperature=0, max_retries=0)
    given, _, converted = CASES["context in the question"]
    whole = chat.invoke(given)
    own = ChatRagCache(base_url=running, api_key=SecretStr(ANN)).invoke(given)
    first, second = (made.prompt for made in built[-2:])
    assert first == second
    assert whole.content == own.text
    assert whole.usage_metadata["input_token_details"]["cache_read"] > 0
    text = "".join(cache.engine.pieces(first.tokens))
    assert all(each["content"].strip() in text for each in converted)
    call = AIMessage("", tool_calls=[CALL])
    tool = ToolMessage(CONTEXT, tool_call_id="1")
    answer = chat.invoke([HumanMessage(QUESTION), call, tool])
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
