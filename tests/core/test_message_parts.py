"""Prompts of messages whose parts are texts and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ragcache.core.request import Request
from ragcache.errors import PromptError
from ragcache.rag import RagCache
from ragcache.types import Segment
from tests import scene

CHUNK = scene.DOCUMENTS[0].text
#: Refuses system messages, and shows tool calls.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    with scene.small(tmp_path) as cache:
        yield cache


def read(cache: RagCache, role: str, content: Any) -> tuple[Segment, ...]:
    (message,) = cache.prompts.read([{"role": role, "content": content}], None)
    return message.content


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_parts_stand_in_their_order(cache: RagCache, role: str) -> None:
    chunk = {"type": "chunk", "text": f" {CHUNK}\n"}
    content = ["Notes:", {"type": "text", "text": "two"}, chunk, {**chunk, "id": "holt"}, "Who?"]
    text, first, second, last = read(cache, role, content)
    assert text == Segment("Notes:\ntwo\n")
    assert (first.text, first.kind) == (f"{CHUNK}\n\n", "chunk") == (second.text, second.kind)
    assert second.id == "holt" and first.id
    assert last == Segment("Who?")


def test_without_chunks_the_last_text_of_a_user_follows_chunks(cache: RagCache) -> None:
    content = [CHUNK, {"type": "text", "text": CHUNK}, "Who?"]
    assert [segment.kind for segment in read(cache, "user", content)] == ["chunk", "chunk", "text"]
    assert [segment.text for segment in read(cache, "tool", content)] == [
        "\n".join([CHUNK] * 2 + ["Who?"])
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "chunk", "text": " "}], "a chunk is empty"),
        ([{"type": "chunk"}], "a part of type 'chunk': only text"),
        ([{"type": "image_url", "text": "a"}], "a part of type 'image_url'"),
        ([3], "a part of type 'int'"),
        (3, "the content of message 0 is a int"),
    ],
)
def test_other_parts_are_refused(cache: RagCache, content: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        read(cache, "user", content)


def test_reports_name_chunks_by_their_ids(cache: RagCache) -> None:
    parts = [{"type": "chunk", "text": f"{n} {CHUNK}", "id": id} for n, id in enumerate("ab")]
    parts.append({"type": "chunk", "text": CHUNK, "id": "doc#7"})
    parts.append({"type": "chunk", "text": f"{CHUNK} Else."})
    answer = cache.ask(messages=[{"role": "user", "content": [*parts, "Who?"]}])
    names = ["a#0", "b#0", "doc#7", "message 0#3"]
    assert [chunk.id for chunk in answer.report.chunks] == names
    assert [passage.chunk.id for passage in answer.passages] == names


def test_arguments_of_tool_calls_are_objects_for_the_template(cache: RagCache) -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "sum", "arguments": arguments}}

    calls = [call('{"of": [1, 2]}'), call({"of": 3}), call("{"), "no call"]
    given = {"role": "assistant", "content": None, "tool_calls": calls}
    user = {"role": "user", "content": "Who?"}
    read, _ = cache.prompts.read([given, user], None)
    assert read.fields["tool_calls"] == [
        call({"of": [1, 2]}),
        call({"of": 3}),
        call("{"),
        "no call",
    ]
    request = Request(messages=[{**given, "tool_calls": calls[:1]}, user], template=NO_SYSTEM)
    assert prompt_text(cache, request) == '[assistant]{"of": [1, 2]}[user]Who?'


def test_instructions_are_folded_where_there_is_no_system_role(cache: RagCache) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    request = Request(messages=messages, template=NO_SYSTEM, instructions="Be brief. ")
    assert prompt_text(cache, request) == "[user]Be brief. Who?"
    system = [{"role": "system", "content": "Be brief."}, *messages]
    with pytest.raises(PromptError, match="no system"):
        prompt_text(cache, Request(messages=system, template=NO_SYSTEM))


def prompt_text(cache: RagCache, request: Request) -> str:
    read = cache.prompts.read(request.messages or (), request.find_chunks)
    prompt, _ = cache.prompts.build(request, [], read)
    return "".join(cache.engine.pieces(prompt.tokens))
