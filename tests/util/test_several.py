"""A single item where a list is expected is an error, in every function that takes a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragcache.batch.plan import make_plan
from ragcache.errors import ConfigError
from ragcache.eval.calibrate import candidates
from ragcache.eval.dataset import load_datasets
from ragcache.eval.evaluate import MODES, make_blenders
from ragcache.retriever.source import read
from ragcache.types import Chunk, Document, Passage
from ragcache.util.list_argument import require_list
from tests import scene


@pytest.mark.parametrize("given", [["a", "b"], ("a", "b"), {"a": 1}.keys(), iter("ab"), set("ab")])
def test_lists_pass_as_they_came(given: Any) -> None:
    assert require_list(given, "ids") is given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("holt", r"ids is one str: give a list, such as \['holt'\]"),
        (b"holt", "ids is one bytes"),
        (Path("docs"), "ids is one .*Path"),
        ({"id": 1}, "ids is one dict"),
        (7, "ids is one int"),
        (None, "ids is None: give a list$"),
    ],
)
def test_one_thing_does_not(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        require_list(given, "ids")


def test_every_door_says_so(tmp_path: Path) -> None:
    one: Any = "docs"
    document, chunk = Document("d", "Some text."), Chunk("d", 0, "Some text.")
    with scene.small(tmp_path) as cache:
        doors: list[Callable[[Any], Any]] = [
            cache.add,
            cache.delete,
            lambda given: cache.ask("Who?", chunks=given),
            lambda given: make_plan(cache, given),
            read,
            load_datasets,
            make_blenders,
            lambda given: make_blenders(["fused"], given),
            candidates,
        ]
        for door in doors:
            with pytest.raises(ConfigError, match="is one str: give a list"):
                door(one)
        for door in (doors[0], doors[3]):
            with pytest.raises(ConfigError, match="documents is one Document"):
                door(document)
        for alone in (chunk, Passage(chunk, 1.0)):
            with pytest.raises(ConfigError, match="chunks is one"):
                doors[2](alone)


def test_empty_is_not_absent(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        assert cache.delete([]) == []
        assert len(cache.documents()) == len(scene.DOCUMENTS)
        assert cache.ask("Where is the mill?", chunks=[]).passages == ()
        with pytest.raises(ConfigError, match="^k is 0: ask for at least 1"):
            cache.ask("Where is the mill?", top_k=0)
        with pytest.raises(ConfigError, match="ttl_s is 0"):
            cache.add(scene.DOCUMENTS, ttl_s=0)
        with pytest.raises(ConfigError, match="^mode '' is unknown"):
            cache.ask("Where is the mill?", mode="")
        assert cache.add([]).documents == 0
        near = cache.retrieve("Where is the mill?", neighbours=0)
        assert len(near) == 2
    assert list(read([])) == []
    assert make_blenders([]) == {} and make_blenders().keys() == MODES.keys()
