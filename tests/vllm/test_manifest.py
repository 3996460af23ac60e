"""A manifest describes any sequence of parts, and gives exactly that prompt back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragcache.errors import PromptError
from ragcache.planning.context import EncodingContext
from ragcache.types import Part, Prompt, Tokens
from ragcache.vllm.handoff import new_ticket
from ragcache.vllm.manifest import FIELD, Manifest
from ragcache.vllm.planner import PlannedRequest, Planner
from ragcache.vllm.salt import cache_salt

MODEL = bytes(range(32))
FOUND = Part((10, 11, 12), True, (10, 11, 12, 13, 14))  # in a longer text than the stored chunk's
GENERAL = Prompt((Part((1, 5)), Part((6,)), FOUND, Part((30,)), Part((20, 21), True), Part((31,))))


def _tokens(least: int = 1) -> st.SearchStrategy[Tokens]:
    ids = st.integers(0, 2**32 - 1)
    return st.lists(ids, min_size=least, max_size=4).map(tuple)


@st.composite
def _part(draw: st.DrawFn) -> Part:
    tokens = draw(_tokens())
    if not draw(st.booleans()):
        return Part(tokens)
    tail = draw(_tokens(0))
    return Part(tokens, True, tokens + tail if tail else None)


@given(st.lists(_part(), min_size=1, max_size=8))
def test_every_prompt_comes_back_as_it_was(parts: list[Part]) -> None:
    prompt = Prompt(tuple(parts))
    how = EncodingContext("prose", (1, 2, 3), most=9)
    made = Manifest.fuse(prompt, "fused", MODEL, encoding=how, ticket=new_ticket())
    read = Manifest.read(json.loads(json.dumps(made.params())))
    assert read == made
    assert read.prompt(list(prompt.tokens)) == prompt
    assert read.encoding(prompt) == how
    assert len(read) == len(prompt)
    ends = [end for _, end in prompt.spans]
    assert read.reuse_end == (max(ends) if ends else prompt.question_start)


def test_a_chunk_alone_is_kept_behind_its_context() -> None:
    for behind in ((), (1, 2)):
        prompt = Manifest.keep((5, 6), behind, MODEL, new_ticket()).prompt((*behind, 5, 6))
        assert (prompt.prefix, prompt.chunks) == (behind, ((5, 6),))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parts": []}, "parts must have the size of each part"),
        ({"parts": [2, 0, 3, 1, 2, 1]}, "parts must have the size of each part"),
        ({"parts": [2, 1.0]}, "parts must be a list of numbers"),
        ({"parts": None}, "parts must be a list of numbers"),
        ({"chunks": [4, 2]}, "chunks must have indices of parts"),
        ({"chunks": [2, 2]}, "chunks must have indices of parts"),
        ({"chunks": [2, 6]}, "chunks must have indices of parts"),
        ({"chunks": [-1, 2]}, "chunks must be a list of numbers"),
        ({"tails": [[13, 14]]}, "tails must have a list for each chunk"),
        ({"tails": [13, 14]}, "each of tails must be a list of numbers"),
        ({"tails": [["13"], []]}, "each of tails must be a list of numbers"),
        ({"tails": "no"}, "tails must be a list of lists"),
        ({"task": "keep"}, "chunks must have the last part alone for keep"),
        ({"task": "keep", "chunks": [5], "tails": [[]]}, "a context and a chunk for keep"),
        ({"tenant": "../other"}, "tenant must be a tenant's name"),
        ({"ticket": "1"}, "ticket must have 32 hex digits"),
        ({"version": 1}, "version 1, but this ragcache reads version 3: use the same release"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(change: dict[str, Any], why: str) -> None:
    params = Manifest.fuse(GENERAL, "fused", MODEL).params()[FIELD] | change
    with pytest.raises(PromptError, match=why):
        Manifest.read({FIELD: params})


def test_a_kept_chunk_has_a_ticket_and_no_tail() -> None:
    params = Manifest.keep((5, 6), (1, 2), MODEL, new_ticket()).params()[FIELD]
    with pytest.raises(PromptError, match="tails must be empty for keep"):
        Manifest.read({FIELD: params | {"tails": [[7]]}})
    with pytest.raises(PromptError, match="ticket must be given for keep"):
        Manifest.read({FIELD: params | {"ticket": ""}})


def test_the_same_tokens_in_other_parts_have_another_salt() -> None:
    a, b = (1, 2, 3), (4, 5)
    prompts = [
        Prompt((Part(a), Part(b), Part((6,)))),
        Prompt((Part(a + b), Part((6,)))),
        Prompt((Part(a, True), Part(b), Part((6,)))),
        Prompt((Part(a), Part(b, True), Part((6,)))),
        Prompt((Part(a, True), Part(b, True), Part((6,)))),
        Prompt((Part(a, True, (*a, 7)), Part(b, True), Part((6,)))),
        Prompt((Part(a, True), Part(b, True, (*b, 7)), Part((6,)))),
        Prompt((Part(a, True, (*a, 8)), Part(b, True), Part((6,)))),
    ]
    assert len({prompt.tokens for prompt in prompts}) == 1
    salts = {cache_salt(Manifest.fuse(prompt, "fused", MODEL)) for prompt in prompts}
    assert len(salts) == len(prompts)


def _matched(prompt: Prompt, computed: int) -> int:
    made = Manifest.fuse(prompt, "fused", MODEL)
    request = PlannedRequest("r", made.params(), prompt.tokens, cache_salt(made))
    return Planner(MODEL.hex()).match(request, computed)


@pytest.mark.parametrize(
    ("prompt", "end"),
    [
        (GENERAL, 9),  # of its last chunk: no text after it is loaded
        (Prompt.of((), ((1, 2), (3,)), (4, 5)), 3),
        (Prompt.of((), ((1, 2),), (4,)), 2),
        (Prompt((Part((1, 2)), Part((3,)), Part((4, 5)))), 3),
        (Prompt((Part((1, 2, 3)),)), 0),
        (Prompt((Part((1, 2)), Part((3, 4), True))), 3),  # vLLM computes the last token
    ],
    ids=str,
)
def test_no_job_once_all_that_is_loaded_is_cached(prompt: Prompt, end: int) -> None:
    for computed in range(len(prompt)):
        expected = 0 if computed >= end else len(prompt) - 1 - computed
        assert _matched(prompt, computed) == expected
