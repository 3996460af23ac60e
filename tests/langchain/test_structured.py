"""Answers that follow a schema, in both places, with every way to ask."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel, Field

from ragcache.errors import ConfigError, PromptError
from ragcache.langchain import ChatRagCache
from tests.langchain.conftest import PLACES

ASKED = "Where does Mira Holt live?"
both_places = pytest.mark.parametrize("place", PLACES, indirect=True, scope="module")


class Home(BaseModel):
    """Where somebody lives."""

    city: Literal["Oslo", "Bergen"]
    floor: Annotated[int, Field(ge=0, le=9)]


class Parrot(TypedDict):
    """Whether there is a parrot."""

    parrot: bool


SCHEMA = {
    "title": "home",
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def answers(model: Runnable[Any, Any]) -> list[Any]:
    """What every way to ask gives, at its end."""

    async def streamed() -> Any:
        return [piece async for piece in model.astream(ASKED)][-1]

    return [
        model.invoke(ASKED),
        asyncio.run(model.ainvoke(ASKED)),
        list(model.stream(ASKED))[-1],
        asyncio.run(streamed()),
    ]


@both_places
def test_an_answer_is_what_its_schema_says(place: dict[str, Any]) -> None:
    model = ChatRagCache(**place, max_tokens=60)
    for home in answers(model.with_structured_output(Home)):
        assert isinstance(home, Home)
    for parrot in answers(model.with_structured_output(Parrot)):
        assert parrot in ({"parrot": True}, {"parrot": False})
    for city in answers(model.with_structured_output(SCHEMA, strict=True)):
        assert city in ({"city": "Oslo"}, {"city": "Bergen"})


@both_places
def test_the_message_can_be_kept(place: dict[str, Any]) -> None:
    both = ChatRagCache(**place, max_tokens=60).with_structured_output(Home, include_raw=True)
    found = both.invoke(ASKED)
    assert isinstance(found, dict) and isinstance(found["raw"], AIMessage)
    assert found["parsed"] == Home.model_validate_json(str(found["raw"].content))
    assert found["parsing_error"] is None
    cut = ChatRagCache(**place, max_tokens=2).with_structured_output(Home, include_raw=True)
    short = cut.invoke(ASKED)
    assert isinstance(short, dict) and short["parsed"] is None
    assert short["parsing_error"] is not None and short["raw"].content


@both_places
def test_any_object_and_any_response_format(place: dict[str, Any]) -> None:
    model = ChatRagCache(**place, max_tokens=8)
    begun = model.with_structured_output(SCHEMA, method="json_mode", include_raw=True).invoke(ASKED)
    assert isinstance(begun, dict) and str(begun["raw"].content).startswith("{")
    form = {"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}}
    bound = ChatRagCache(**place, response_format=form)
    assert bound.invoke(ASKED).content in ("true", "false")
    assert bound.invoke(ASKED, response_format={"type": "text"}).content not in ("true", "false")
    for wrong in ({"type": "xml"}, {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}):
        with pytest.raises((ConfigError, PromptError), match="response_format|JSON schema"):
            model.invoke(ASKED, response_format=wrong)


def test_options_that_are_none_are_refused(cache: Any) -> None:
    model = ChatRagCache(store=cache)
    with pytest.raises(ValueError, match="method is 'function_calling': use json_schema or"):
        model.with_structured_output(Home, method="function_calling")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tools: unknown option of with_structured_output"):
        model.with_structured_output(Home, tools=[])
