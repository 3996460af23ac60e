"""The parts of earlier prompts are found again, also by what is similar to them."""

from __future__ import annotations

import threading

from ragcache.core.seen_parts import SeenParts
from ragcache.store.key import ChunkKey
from ragcache.types import Fingerprint, Tokens

LONG = tuple(range(100, 200))


def key(tokens: Tokens, context: Tokens = ()) -> ChunkKey:
    return ChunkKey(Fingerprint((("weights", "a"),)), tokens, context)


def test_a_part_is_known_by_its_key() -> None:
    seen = SeenParts()
    assert seen.was_stored(key(LONG)) is None
    seen.add(key(LONG), stored=False)
    assert seen.was_stored(key(LONG)) is False and seen.was_stored(key(LONG, (1,))) is None
    seen.add(key(LONG), stored=True)
    seen.add(key(LONG), stored=False)
    assert seen.was_stored(key(LONG)) is True and len(seen) == 1


def test_an_edited_part_is_similar_to_what_it_was() -> None:
    seen = SeenParts()
    seen.add(key(LONG), "a#0", stored=True)
    middle = (*LONG[:50], 7, *LONG[50:])
    beginning, end = (7, *LONG), (*LONG, 7)
    for tokens in (middle, beginning, end):
        assert seen.similar(tokens) == LONG
    both_ends = (7, *LONG[1:-1], 7)
    assert seen.similar(both_ends) is None and seen.similar(both_ends, "b#0") is None
    assert seen.similar(both_ends, "a#0") == LONG
    assert seen.similar((7,) * 50, "a#0") is None  # another text under the same name
    assert seen.similar(LONG) == LONG  # the same tokens behind other text


def test_the_most_similar_part_is_found() -> None:
    seen = SeenParts()
    near, far = (*LONG[:50], 7, *LONG[51:]), (*LONG[:16], *range(500, 584))
    seen.add(key(near), stored=True)
    seen.add(key(far), stored=True)  # has the same first tokens, and is later
    assert seen.similar(LONG) == near


def test_the_oldest_parts_are_forgotten() -> None:
    seen = SeenParts(capacity=2)
    parts = [tuple(range(n, n + 40)) for n in (0, 100, 200)]
    for part in parts:
        seen.add(key(part), stored=True)
    assert len(seen) == 2 and seen.was_stored(key(parts[0])) is None
    assert seen.similar((*parts[0], 7)) is None and seen.similar((*parts[1], 7)) == parts[1]
    seen = SeenParts()
    huge = tuple(range(1 << 19))
    for number in range(4):
        seen.add(key((number, *huge)), stored=True)
    assert len(seen) == 1  # their tokens are bounded too


def test_threads_may_share_it() -> None:
    seen = SeenParts(capacity=8)

    def work(number: int) -> None:
        for n in range(200):
            tokens = tuple(range(number * n, number * n + 20))
            seen.add(key(tokens), str(n % 5), stored=bool(n % 2))
            seen.similar((*tokens, 1), str(n % 7))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
