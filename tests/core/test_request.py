"""The options of a request, and what its messages must have."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from ragcache.core.request import Request, RequestOptions, check_asks
from ragcache.errors import PromptError


def test_every_option_is_a_field_of_the_same_type() -> None:
    options = RequestOptions.__annotations__
    written = {name: getattr(kind, "__forward_arg__", kind) for name, kind in options.items()}
    question, *others = fields(Request)
    assert question.name == "question"
    assert written == {field.name: field.type for field in others}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": " \n"}], "the last message is empty"),
        (
            [{"role": "user", "content": [{"type": "text", "text": ""}]}],
            "the last message is empty",
        ),
        (
            [{"role": "system", "content": "Be brief."}],
            "no message of a user or tool among these 1",
        ),
        ([{"role": "assistant", "content": "Hi."}], "no message of a user or tool"),
    ],
)
def test_messages_without_a_question_are_refused(messages: list[Any], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        check_asks(messages)


def test_messages_with_a_question_are_not() -> None:
    user = {"role": "user", "content": "Who?"}
    check_asks([user, {"role": "assistant", "content": ""}])
    check_asks([{"role": "tool", "content": "Oslo."}])
    check_asks([{"content": "a message without a role is refused elsewhere"}, user])
    check_asks([1])
