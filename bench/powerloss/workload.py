"""The steps that are applied to a store, and what it must contain after each."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ragcache.store import Catalog, ChunkKey, DiskStore
from ragcache.types import Chunk, ChunkKV, Document, Fingerprint

MODEL = Fingerprint((("weights", "random"),), "powerloss")
LAYERS, HEADS, DIM = 3, 2, 16
SCRATCH = 1 << 18  # bytes
LAYOUTS = ("records", "files")
LOOSE = range(32)  # chunks that no document uses
DOCUMENTS, SLOTS, TEXTS = 8, 3, 5
USED = range(
    100, 100 + DOCUMENTS * TEXTS
)  # those that documents use, TEXTS for each to choose from


@dataclass(frozen=True, slots=True)
class Step:
    """``open`` anew, ``put`` and ``delete`` (a chunk), ``document`` and ``forget`` (a document),
    ``convert``, ``compact``, ``scratch`` (a commit that takes out again what it put in). Each is
    one commit, as far as what is stored is concerned."""

    kind: str
    number: int = 0  # of the chunk or document
    version: int = 0  # no two steps have the same
    layout: str = ""
    uses: tuple[int, ...] = ()  # the chunks of a document


@dataclass(frozen=True)
class State:
    """The content of a store."""

    chunks: Mapping[int, int] = field(default_factory=dict)  # number -> version
    documents: Mapping[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def after(self, step: Step) -> State:
        chunks, documents = dict(self.chunks), dict(self.documents)
        if step.kind == "put":
            chunks[step.number] = step.version
        elif step.kind == "delete":
            chunks.pop(step.number, None)
        elif step.kind in ("document", "forget"):
            _, let_go = documents.pop(step.number, (0, ()))
            if step.kind == "document":
                documents[step.number] = step.version, step.uses
            for number in set(let_go) - set(step.uses):
                chunks.pop(number, None)
        return State(chunks, documents)


def plan(seed: int, steps: int, without: Collection[str] = ()) -> list[Step]:
    """About that many steps, of all kinds but those; the first opens the store."""
    rng = random.Random(seed)
    made, state = [Step("open")], State()

    def add(kind: str, number: int = 0, uses: tuple[int, ...] = ()) -> None:
        nonlocal state
        made.append(Step(kind, number, len(made), rng.choice(LAYOUTS), uses))
        state = state.after(made[-1])

    kinds = {"put": 50, "delete": 15, "document": 18, "forget": 4}
    kinds |= {"convert": 2, "compact": 4, "open": 3, "scratch": 3}
    kinds = {kind: share for kind, share in kinds.items() if kind not in without}
    while len(made) < steps:
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        if kind == "put":
            add(kind, rng.choice((*LOOSE, *state.chunks)))
        elif kind == "delete" and state.chunks:
            add(kind, rng.choice(list(state.chunks)))
        elif kind == "document":
            number = rng.randrange(DOCUMENTS)
            uses = rng.sample(USED[number * TEXTS : (number + 1) * TEXTS], SLOTS)
            for used in uses:
                if used not in state.chunks:
                    add("put", used)
            add(kind, number, tuple(uses))
        elif kind == "forget" and state.documents:
            add(kind, rng.choice(list(state.documents)))
        elif kind in ("convert", "compact", "open", "scratch"):
            add(kind)
    return made


def states(steps: Sequence[Step]) -> list[State]:
    """What is there before each step, and after the last."""
    seen = [State()]
    for step in steps:
        seen.append(seen[-1].after(step))
    return seen


class Subject:
    """The store that the steps are done to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: DiskStore | None = None

    def do(self, step: Step) -> None:
        if step.kind == "open":
            self.close()
            self.store = DiskStore(self.path)
            return
        store = self.store
        assert store is not None
        if step.kind == "put":
            store.layout = "files" if step.layout == "files" else "records"
            store.put(key(step.number), kv(step.number, step.version))
        elif step.kind == "delete":
            assert store.delete(key(step.number))
        elif step.kind == "document":
            put_document(Catalog(store), step)
        elif step.kind == "forget":
            assert Catalog(store).delete_document(name(step.number))
        elif step.kind == "convert":
            store.convert("files" if step.layout == "files" else "records")
        elif step.kind == "scratch":
            with store.change() as change:
                change.txn.put("settings", b"scratch", bytes(SCRATCH))
                change.txn.delete("settings", b"scratch")
        else:
            store.compact()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def key(number: int) -> ChunkKey:
    """Of 4 to 31 tokens: layers of 1 to 8 KiB."""
    return ChunkKey(MODEL, tuple(range(number, number + 4 + number * 7 % 28)))


@lru_cache(4096)
def kv(number: int, version: int) -> ChunkKV:
    """What is put under ``key(number)`` by the step of that version, and by no other."""
    tokens = key(number).tokens
    rng = np.random.default_rng((number, version))
    both = rng.standard_normal((2, LAYERS, HEADS, len(tokens), DIM), dtype=np.float32)
    keys, values = torch.from_numpy(both)
    return ChunkKV(tokens, tuple(keys), tuple(values), (float(version % 997),) * len(tokens))


def same(left: ChunkKV, right: ChunkKV) -> bool:
    pairs = zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True)
    known = left.tokens, left.sensitivity
    return known == (right.tokens, right.sensitivity) and all(torch.equal(a, b) for a, b in pairs)


def name(document: int) -> str:
    return f"document-{document}"


def texts(document: int, version: int) -> list[Chunk]:
    return [
        Chunk(name(document), slot, f"text {slot} of {document}, version {version}. " * 9)
        for slot in range(SLOTS)
    ]


def put_document(catalog: Catalog, step: Step) -> None:
    vectors = np.full((SLOTS, 8), step.version, np.float32)
    digest = step.version.to_bytes(8, "little")
    contents = [key(number).content for number in step.uses]
    document = Document(name(step.number), "")
    chunks = texts(step.number, step.version)
    catalog.put_document(document, chunks, vectors, digest, contents=contents)
