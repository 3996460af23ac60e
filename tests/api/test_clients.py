"""The real client libraries, unchanged, over a real socket."""

from __future__ import annotations

import time
import warnings
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from tests.api.conftest import ANN, Served

QUESTION = "Where does Mira Holt live?"
ASKED: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(running: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=ANN, max_retries=0)


def test_openai_completes_a_chat(client: openai.OpenAI) -> None:
    with client:
        [model] = client.models.list()
        whole = client.chat.completions.create(model=model.id, messages=ASKED, user="me", n=1)
        assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.prompt_tokens_details.cached_tokens
        assert whole.model_extra and whole.model_extra["ragcache"]["chunks"]
        options: Any = {"include_usage": True}
        stream = client.chat.completions.create(
            model=model.id, messages=ASKED, stream=True, stream_options=options
        )
        events = list(stream)
        said = [e.choices[0].delta.content or "" for e in events if e.choices]
        assert "".join(said) == whole.choices[0].message.content
        assert events[-1].usage is not None
        given: Any = {"documents": ["Mira Holt lives in Oslo."], "ragcache": {"mode": "full"}}
        brought = client.chat.completions.create(model=model.id, messages=ASKED, extra_body=given)
        assert brought.model_extra and brought.model_extra["ragcache"]["mode"] == "full"


def test_openai_continues_a_chat_with_the_message_it_got(client: openai.OpenAI) -> None:
    with client:
        first = client.chat.completions.create(model="ragcache", messages=ASKED)
        answered: Any = first.choices[0].message
        more = [*ASKED, answered, *ASKED]
        second = client.chat.completions.create(model="ragcache", messages=more)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens  # the turn before is in it
    assert second.choices[0].message.content


def test_openai_stops_an_answer_and_goes_on(running: Served, client: openai.OpenAI) -> None:
    """What a user's stop button does: the next turn reuses the prompt all the same."""
    chat: Any = [{"role": "user", "content": "Which of the birds by the sea is a parrot? " * 4}]
    with client:
        options: Any = {"model": "ragcache", "extra_body": {"documents": []}}
        with client.chat.completions.create(
            messages=chat, stream=True, max_tokens=300, **options
        ) as stream:
            said = next(e.choices[0].delta.content for e in stream if e.choices[0].delta.content)
        scheduler, until = running.service.scheduler, time.monotonic() + 20
        while scheduler.depth() != (0, 0):  # until the service has heard of it
            assert time.monotonic() < until
            time.sleep(0.005)
        more = [*chat, {"role": "assistant", "content": said}, *ASKED]
        second = client.chat.completions.create(messages=more, **options)
    first = running.service.cache("ann").engine.tokenize(chat[0]["content"])
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= len(first)


def test_openai_raises_its_own_errors(running: Served, client: openai.OpenAI) -> None:
    with client:
        with pytest.raises(openai.BadRequestError, match="n is not supported") as caught:
            client.chat.completions.create(model="ragcache", messages=ASKED, n=2)
        assert caught.value.request_id
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.chat.completions.create(model="gpt-5", messages=ASKED)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong") as stranger:
        with pytest.raises(openai.AuthenticationError, match="API key is unknown"):
            stranger.models.list()


def test_langchain_asks_and_streams(running: Served) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies, at import
        from langchain_openai import ChatOpenAI
    options: Any = {"base_url": f"{running.url}/v1", "api_key": ANN, "model": "ragcache"}
    chat = ChatOpenAI(**options, temperature=0, max_retries=0)
    whole = chat.invoke([("system", "Be brief."), ("human", QUESTION)])
    assert whole.usage_metadata is not None and whole.usage_metadata["input_tokens"] > 0
    pieces = list(chat.stream([("system", "Be brief."), ("human", QUESTION)]))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    brought = chat.invoke(QUESTION, extra_body={"documents": [{"title": "a", "text": "b"}]})
    assert brought.usage_metadata is not None
    call = AIMessage("", tool_calls=[{"name": "notes", "args": {}, "id": "1"}])
    result = ToolMessage(["Mira Holt", "lives in Oslo."], tool_call_id="1")
    assert chat.invoke([HumanMessage(QUESTION), call, result]).content
