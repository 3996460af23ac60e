"""SIGKILL at random times during any change of a store, repeatedly on the same two stores.

A forked writer draws operations from a seed, and reports each when it is done. After it is killed,
the seed and the number of reports determine what the store must contain. The operation that was
running may or may not have taken effect, chunk by chunk.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from bench.reliability.child import Child, Send
from bench.reliability.outcome import Outcome, counts, scratch
from bench.reliability.samples import (
    LAYERS,
    SPEC,
    Wrong,
    chunk_key,
    chunk_kv,
    put,
    served,
    unsound,
)
from ragcache.core.precompute import precompute
from ragcache.engine.base import Engine
from ragcache.store import Catalog, DiskStore
from ragcache.store.disk.quota import UNBOUNDED, Quota
from ragcache.store.disk.store import Layout
from ragcache.types import Chunk, ChunkKV, Document, Tokens

FULL, SHORT = 500, 5
CHUNKS = 18
LAYOUTS: tuple[Layout, ...] = ("records", "files")
QUOTAS = (UNBOUNDED, Quota(300_000))  # bytes: of no writer, and of one that evicts
_LONGEST = 0.15  # seconds that a writer lives
_VERSIONS = 10_000  # operations of one writer at most: each has a version of its own
Expected = dict[int, set[int | None]]  # chunk -> versions that may be served, None for none


@dataclass(frozen=True, slots=True)
class Step:
    """An operation, and what becomes of the chunks: their versions, None where they go."""

    run: Callable[[DiskStore], object]
    sets: Mapping[int, int | None] = field(default_factory=dict)
    fills: Mapping[int, int] = field(default_factory=dict)  # only where there is no such chunk
    grows: bool = False  # with a quota, any other chunk may go


def operations(rng: random.Random, version: int) -> dict[str, Step]:
    """One of each kind. What they draw does not depend on what is stored."""
    one, *few = rng.sample(range(CHUNKS), 5)
    layout = rng.choice(LAYOUTS)
    return {
        "put": Step(lambda s: put(s, one, version), sets={one: version}, grows=True),
        "delete": Step(lambda s: s.delete(chunk_key(one)), sets={one: None}),
        "forget": Step(lambda s: forget(s, few[:2]), sets=dict.fromkeys(few[:2])),
        "precompute": Step(
            lambda s: encode(s, few, version), fills=dict.fromkeys(few, -version), grows=True
        ),
        "convert": Step(lambda s: s.convert(layout), grows=True),
        "compact": Step(lambda s: s.compact()),
    }


def steps(seed: str) -> Iterator[tuple[str, Step]]:
    """What a writer does, for ever; the same for the same seed."""
    rng, first = random.Random(seed), _VERSIONS * int(seed.rpartition("/")[2])
    for version in range(first + 1, first + _VERSIONS):
        drawn = operations(rng, version)
        name = rng.choice(["put", "put", *drawn])
        yield name, drawn[name]


def forget(store: DiskStore, numbers: Sequence[int]) -> None:
    """Index a document that uses these chunks, and delete it: their KV goes in the same commit."""
    catalog = Catalog(store)
    chunks = [Chunk("document", n, f"text {n}") for n in range(len(numbers))]
    vectors = np.ones((len(chunks), 4), np.float32)
    contents = [chunk_key(number).content for number in numbers]
    catalog.put_document(Document("document", "text"), chunks, vectors, b"", contents=contents)
    catalog.delete_document("document")


def finish(path: Path, expected: Expected, numbers: Iterable[int]) -> None:
    """Delete the document, with its KV, that a writer had no time to."""
    with DiskStore(path) as store:
        if Catalog(store).delete_document("document"):
            expected.update((number, {None}) for number in numbers)


class Encoder:
    """As much of an engine as ``precompute`` asks for: its KV is that of a version."""

    spec, fingerprint = SPEC, chunk_key(0).fingerprint
    context_tokens = 0  # no room to measure sensitivity

    def __init__(self, version: int) -> None:
        self.version = version

    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        return [chunk_kv(tokens, self.version) for tokens in chunks]


def encode(store: DiskStore, numbers: Sequence[int], version: int) -> None:
    precompute(cast("Engine", Encoder(-version)), store, map(chunk_key, numbers), batch_tokens=128)


def write(path: Path, seed: str, layout: Layout, quota: Quota, send: Send) -> None:
    store = DiskStore(path, layout=layout, quota=quota)
    for name, step in steps(seed):
        step.run(store)
        send(name)


def follow(expected: Expected, step: Step, *, acknowledged: bool, evicts: bool) -> None:
    """What may be served once ``step`` has happened; or has perhaps, in part."""
    for number, may_be in expected.items():
        if number in step.sets:
            now = {step.sets[number]}
        else:
            filled = step.fills.get(number)
            now = {filled if version is None else version for version in may_be}
            if evicts and step.grows:
                now |= {None}
        expected[number] = now if acknowledged else now | may_be


def look(path: Path, expected: Expected) -> list[str]:
    """What a reader finds that comes before the next writer has tidied up."""
    if not any((path / name).exists() for name in ("CURRENT", "data.mdb")):
        return []
    wrong = []
    with DiskStore(path, readonly=True) as store:
        for number, may_be in expected.items():
            try:
                if served(store, number) not in may_be:
                    wrong.append("a reader finds another version than acknowledged")
            except Wrong as error:
                wrong.append(f"a reader: {error}")
    return wrong


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} kills")
    killed_in: Counter[str] = Counter()
    acknowledged = 0
    rng = random.Random(seed)
    with scratch() as folder:
        stores: dict[Path, Expected] = {
            folder / layout: {number: {None} for number in range(CHUNKS)} for layout in LAYOUTS
        }
        for turn in range(rounds):
            layout, quota = LAYOUTS[turn % 2], QUOTAS[turn // 2 % 2]
            path, name = folder / layout, f"{seed}/{turn}"
            with Child(partial(write, path, name, layout, quota)) as child:
                time.sleep(rng.uniform(0.005, _LONGEST))
                child.kill()
                done = child.read()
            if child.status != -9:
                outcome.violations.append(f"a writer ended by itself: {child.status}")
            plan, expected = steps(name), stores[path]
            evicts = quota != UNBOUNDED
            for _ in done:
                follow(expected, next(plan)[1], acknowledged=True, evicts=evicts)
            running, step = next(plan)
            follow(expected, step, acknowledged=False, evicts=evicts)
            wrong = [*(look(path, expected) if done else []), *unsound(path, expected)]
            outcome.violations += [f"{what} (killed in {running})" for what in wrong]
            if running == "forget":
                finish(path, expected, step.sets)
            killed_in[running] += 1
            acknowledged += len(done)
    outcome.figures += [
        f"{acknowledged} acknowledged operations, {CHUNKS} chunks of {LAYERS} layers",
        f"killed in: {counts(killed_in)}",
    ]
    return outcome
