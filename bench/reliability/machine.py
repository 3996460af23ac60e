"""Random programs against a store and a dict: whatever is served is what was put last.

Hypothesis draws the programs, and where one fails finds the shortest that does. Every step happens
to the store in memory and to one on disk of either layout, and to a catalog in each; ``compact``,
``convert`` and ``reopen`` must change nothing. What a document let go of is served no more.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from bench.reliability.outcome import Outcome, scratch
from bench.reliability.samples import MODEL, OTHER, chunk_key, chunk_kv, same, strays
from ragcache.store import Catalog, ChunkKey, ChunkStore, DiskStore, MemoryStore, Miss
from ragcache.store.disk.store import Layout
from ragcache.store.key import variant_key
from ragcache.types import Chunk, ChunkKV, ChunkNotes, Document

FULL, SHORT = 1000, 8
STEPS = 50
PLAIN = [chunk_key(number) for number in (0, 2, 4)]
OTHERS = [chunk_key(number, OTHER) for number in (0, 2)]
VARIANTS = [variant_key(MODEL, key.tokens, before) for key in PLAIN[:2] for before in ((1,), (2,))]
KEYS = [*PLAIN, *OTHERS, *VARIANTS]
CONTENTS = sorted({key.content for key in KEYS})
NAMES = ["one", "two", "three"]

keys, names = st.sampled_from(KEYS), st.sampled_from(NAMES)
contents = st.lists(st.sampled_from(CONTENTS), max_size=3)
times = st.none() | st.integers(1, 9).map(float)
layouts: st.SearchStrategy[Layout] = st.sampled_from(["records", "files"])


@dataclass
class Told:
    """What is known of a document: of every row, the KV that it uses."""

    rows: list[set[bytes]]
    expires: float | None
    pinned: bool


class Machine(RuleBasedStateMachine):
    """The dicts, and the stores that must say the same."""

    folder: Path  # set by the caller: where to make stores

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(dir=self.folder))
        self.disks = [DiskStore(self.path / name, layout=name) for name in _layouts()]
        self.memory = MemoryStore()
        self.chunks: dict[ChunkKey, ChunkKV] = {}
        self.notes: dict[ChunkKey, tuple[ChunkNotes, float]] = {}
        self.documents: dict[str, Told] = {}
        self.version = 0

    @property
    def stores(self) -> list[MemoryStore | DiskStore]:
        return [self.memory, *self.disks]

    @property
    def catalogs(self) -> list[Catalog]:
        return [Catalog(store) for store in self.stores]

    @rule(key=keys, noted=st.booleans())
    def put(self, key: ChunkKey, noted: bool) -> None:
        self.version += 1
        kv, notes = chunk_kv(key.tokens, self.version), None
        if noted and key in VARIANTS:
            notes = ChunkNotes((), (), (float(self.version),) * len(key.tokens), 0.75)
        for store in self.stores:
            if notes is None:
                store.put(key, kv)
            else:
                store.variants.put(key, kv, notes)
        self.chunks[key] = kv
        self.notes.pop(key, None)
        if notes is not None:
            self.notes[key] = notes, 0.0
        self.check([key])

    @rule(key=keys)
    def delete(self, key: ChunkKey) -> None:
        was = self.chunks.pop(key, None) is not None
        self.notes.pop(key, None)
        assert [store.delete(key) for store in self.stores] == [was] * len(self.stores)
        self.check([key])

    @rule(key=keys)
    def get(self, key: ChunkKey) -> None:
        self.check([key])

    @rule(key=st.sampled_from([*PLAIN, *VARIANTS]))
    def variants(self, key: ChunkKey) -> None:
        mine = [k for k in self.notes if (k.fingerprint, k.content) == (MODEL, key.content)]
        mine = sorted(mine, key=lambda k: k.digest) if key.fingerprint == MODEL else []
        for store in self.stores:
            found = [(v.stored.key, v.notes, v.score) for v in store.variants.find(key)]
            assert found == [(k, *self.notes[k]) for k in mine]

    @rule(key=keys, worth=st.integers(1, 9).map(float))
    def credit(self, key: ChunkKey, worth: float) -> None:
        for store in self.stores:
            store.variants.add_score({key: worth})
        if key in self.notes:
            notes, score = self.notes[key]
            self.notes[key] = notes, score + worth
        self.variants(key)

    @rule(layout=layouts)
    def convert(self, layout: Layout) -> None:
        for store in self.disks:
            store.convert(layout)
        self.check(KEYS)

    @rule()
    def compact(self) -> None:
        for store in self.disks:
            store.compact()
        self.check(KEYS)

    @rule()
    def reopen(self) -> None:
        for store in self.disks:
            store.close()
        self.disks = [DiskStore(store.tables.path, layout=store.layout) for store in self.disks]
        self.check(KEYS)

    @rule(name=names, uses=contents, expires=times, pinned=st.booleans())
    def index(self, name: str, uses: list[bytes], expires: float | None, pinned: bool) -> None:
        chunks = [Chunk(name, n, f"{name} {n}") for n in range(len(uses))]
        vectors = np.ones((len(uses), 4), np.float32)
        for catalog in self.catalogs:
            catalog.put_document(
                Document(name, "text"),
                chunks,
                vectors,
                b"",
                contents=uses,
                expires=expires,
                pinned=pinned,
            )
        before = self.documents.get(name)
        self.documents[name] = Told([{content} for content in uses], expires, pinned)
        self.let_go(before)

    @rule(name=names, uses=contents)
    def use(self, name: str, uses: list[bytes]) -> None:
        for catalog in self.catalogs:
            catalog.add_references(name, uses)
        told = self.documents.get(name)
        if told is not None and len(told.rows) == len(uses):
            for row, content in zip(told.rows, uses, strict=True):
                row.add(content)

    @rule(name=names)
    def drop(self, name: str) -> None:
        was = name in self.documents
        found = [catalog.delete_document(name) for catalog in self.catalogs]
        assert found == [was] * len(self.stores)
        self.let_go(self.documents.pop(name, None))

    @rule(name=names, expires=times, pinned=st.none() | st.booleans())
    def keep(self, name: str, expires: float | None, pinned: bool | None) -> None:
        was = name in self.documents
        found = [
            catalog.set_retention(name, expires=expires, pinned=pinned) for catalog in self.catalogs
        ]
        assert found == [was] * len(self.stores)
        if was and expires is not None:
            self.documents[name].expires = expires
        if was and pinned is not None:
            self.documents[name].pinned = pinned
        self.check([])

    @rule(now=st.integers(1, 9).map(float))
    def expire(self, now: float) -> None:
        over = sorted(n for n, t in self.documents.items() if t.expires and t.expires <= now)
        assert [catalog.expire(now) for catalog in self.catalogs] == [over] * len(self.stores)
        self.let_go(*map(self.documents.pop, over))

    def let_go(self, *before: Told | None) -> None:
        """KV that only the rows of these used is gone."""
        still = {c for told in self.documents.values() for row in told.rows for c in row}
        gone = {c for told in before if told for row in told.rows for c in row} - still
        for key in [key for key in self.chunks if key.content in gone]:
            del self.chunks[key]
            self.notes.pop(key, None)
        self.check([key for key in KEYS if key.content in gone])

    def check(self, touched: list[ChunkKey]) -> None:
        """Everywhere the same documents and chunks; of those that were touched, every bit."""
        digests = sorted(key.digest for key in self.chunks)
        told = [(n, len(t.rows), t.expires, t.pinned) for n, t in sorted(self.documents.items())]
        for store, catalog in zip(self.stores, self.catalogs, strict=True):
            assert list(store.keys()) == digests
            found = catalog.entries()
            assert [(e.id, e.chunks, e.expires, e.pinned) for e in found] == told
            for key in touched:
                self.check_chunk(store, key)

    def check_chunk(self, store: ChunkStore, key: ChunkKey) -> None:
        found, right = store.get(key), self.chunks.get(key)
        assert store.has(key) == (right is not None)
        if right is not None:
            assert isinstance(found, ChunkKV) and same(found, right)
        else:
            assert isinstance(found, Miss) and found == self.memory.get(key)

    def teardown(self) -> None:
        try:
            self.check(KEYS)
            for store in self.disks:
                assert store.verify() == {} and not strays(store)
        finally:
            for one in self.stores:
                one.close()
            shutil.rmtree(self.path)


def _layouts() -> tuple[Layout, ...]:
    return "records", "files"


def run(rounds: int, number: int) -> Outcome:
    outcome = Outcome(f"{rounds} runs of {STEPS} steps")
    chosen = settings(
        max_examples=rounds,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    with scratch() as folder:
        Machine.folder = folder
        try:
            run_state_machine_as_test(seed(number)(Machine), settings=chosen)
        except Exception as error:  # whatever a program ran into
            notes = "\n".join(getattr(error, "__notes__", []))
            outcome.violations.append(f"{type(error).__name__}: {error}\n{notes}")
    outcome.figures.append(f"{len(KEYS)} keys and {len(NAMES)} documents in 3 stores")
    return outcome
