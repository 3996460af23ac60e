"""The choice of a server for a prompt."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from ragcache.errors import ConfigError
from ragcache.util.rendezvous import home
from ragcache.vllm.router import Router

URLS = ["http://a", "http://b", "http://c"]
CHUNKS = [bytes([number]) * 32 for number in range(200)]


def at_home(url: str) -> dict[bytes, int]:
    return {digest: 10 for digest in CHUNKS if home(digest, URLS) == url}


def test_chunks_are_spread_over_the_servers() -> None:
    assert all(40 < len(at_home(url)) < 95 for url in URLS)


def test_when_a_server_goes_only_its_chunks_move() -> None:
    left = URLS[:2]
    moved = [digest for digest in CHUNKS if home(digest, URLS) != home(digest, left)]
    assert moved == list(at_home(URLS[2]))


@pytest.mark.parametrize("url", URLS)
def test_a_prompt_goes_where_most_of_its_tokens_are_at_home(url: str) -> None:
    others = dict.fromkeys(sum((list(at_home(u))[:2] for u in URLS if u != url), []), 10)
    chunks = others | dict.fromkeys(list(at_home(url))[:1], 30)
    assert Router(URLS).choose(chunks) == url


def test_a_server_that_is_far_behind_is_spared() -> None:
    replicas, mine = Router(URLS, slack=2), at_home(URLS[0])
    with ExitStack() as stack:
        for _ in range(3):
            assert replicas.choose(mine) == URLS[0]
            stack.enter_context(replicas.count_request(URLS[0]))
        assert replicas.choose(mine) in URLS[1:]
        for url in URLS[1:]:
            stack.enter_context(replicas.count_request(url))
        assert replicas.choose(mine) == URLS[0]
    assert replicas.busy() == dict.fromkeys(URLS, 0)


def test_without_chunks_the_least_busy_is_asked() -> None:
    replicas = Router(URLS)
    with replicas.count_request(URLS[0]), replicas.count_request(URLS[1]):
        assert replicas.choose({}) == URLS[2]


def test_a_lost_server_is_the_last_resort() -> None:
    replicas, mine = Router(URLS, down_s=100), at_home(URLS[0])
    replicas.mark_down(URLS[0])
    assert replicas.choose(mine) in URLS[1:]
    assert replicas.choose(mine, without=URLS[1:]) == URLS[0]
    assert replicas.choose(mine, without=URLS) is None
    replicas.mark_up(URLS[0])
    assert replicas.choose(mine) == URLS[0]


def test_a_lost_server_is_tried_again() -> None:
    replicas = Router(URLS, down_s=0)
    replicas.mark_down(URLS[0])
    assert replicas.choose(at_home(URLS[0])) == URLS[0]


@pytest.mark.parametrize("urls", [[], ["http://a", "http://a"]])
def test_every_server_is_named_once(urls: list[str]) -> None:
    with pytest.raises(ConfigError, match="name each server once"):
        Router(urls)
