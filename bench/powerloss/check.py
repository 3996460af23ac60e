"""Check that a store after a power loss contains what was acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.powerloss.workload import (
    DOCUMENTS,
    LOOSE,
    USED,
    State,
    Step,
    key,
    kv,
    name,
    same,
    texts,
)
from ragcache.errors import StoreError
from ragcache.store import Catalog, DiskStore, Miss
from ragcache.store.format.header import Header, decode_header
from ragcache.types import ChunkKV


@dataclass
class Outcome:
    """The result of one replay."""

    replay: int
    cut: str = ""  # where
    opened: bool = False
    refused: bool = False  # to open a store whose making was not acknowledged
    checked: int = 0  # chunks that are there, as they were put
    lost: list[str] = field(default_factory=list)  # acknowledged, and gone
    wrong: list[str] = field(default_factory=list)  # anything else

    @property
    def is_good(self) -> bool:
        return not self.lost and not self.wrong


class Check:
    """Opens a store, and notes in ``outcome`` where it is in none of the allowed states."""

    def __init__(self, outcome: Outcome, steps: Sequence[Step], allowed: Sequence[State]) -> None:
        """``steps``: those begun. ``allowed``: with the last of them and, if it runs, without."""
        self.outcome, self.steps, self.allowed = outcome, steps, allowed

    def run(self, path: Path) -> None:
        ended = len(self.steps) - len(self.allowed) + 1
        try:
            store = DiskStore(path)
        except Exception as error:
            self.outcome.refused = not ended and isinstance(error, StoreError)
            if not self.outcome.refused:
                self.outcome.wrong.append(f"does not open: {_text(error)}")
            return
        self.outcome.opened = True
        try:
            with store:
                self._check(store)
        except Exception as error:  # whatever it is: it is not what was promised
            self.outcome.wrong.append(_text(error))

    def _check(self, store: DiskStore) -> None:
        state = State(self._chunks(store), self._documents(store))
        if state not in self.allowed and self.outcome.is_good:
            self.outcome.wrong.append("what is there is the state after no step, nor before one")
        self._check_store(store, len(state.chunks))
        store.put(key(0), kv(0, 10**6))
        if not _is(store.get(key(0)), 0, 10**6):
            self.outcome.wrong.append("a chunk that is put now does not come back")

    def _chunks(self, store: DiskStore) -> dict[int, int]:
        """Number -> version of all there are."""
        seen = {}
        for number in (*LOOSE, *USED):
            allowed = {state.chunks.get(number) for state in self.allowed}
            found = store.get(key(number))
            if isinstance(found, Miss):
                if None not in allowed:
                    self.outcome.lost.append(f"chunk {number}: {found.reason}, {found.detail}")
                elif found.reason != "absent":
                    self.outcome.wrong.append(f"chunk {number}: {found.reason}, {found.detail}")
                continue
            versions = [version for version in allowed if version and _is(found, number, version)]
            if versions:
                seen[number] = versions[0]
                self.outcome.checked += 1
                continue
            puts = [s.version for s in self.steps if s.kind == "put" and s.number == number]
            old = [version for version in puts if _is(found, number, version)]
            what = f"of step {old}, which is over" if old else "that was never put"
            self.outcome.wrong.append(f"chunk {number}: KV {what}")
        return seen

    def _documents(self, store: DiskStore) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Number -> version and chunks used, of all there are."""
        catalog, seen, wrong = Catalog(store), {}, self.outcome.wrong
        rows, vectors = catalog.vectors()
        vector_of = dict(zip(rows.tolist(), vectors, strict=True))
        for number in range(DOCUMENTS):
            digest, mine = catalog.document_digest(name(number)), catalog.rows_of(name(number))
            if digest is None:
                continue
            version = int.from_bytes(digest, "little")
            seen[number] = version, self._uses(store, mine)
            if catalog.chunks(mine) != texts(number, version):
                wrong.append(f"document {number}: other texts than were put")
            if any(not np.array_equal(vector_of.pop(r), np.full(8, version)) for r in mine):
                wrong.append(f"document {number}: other vectors than were put")
        if vector_of or len(catalog.entries()) != len(seen):
            wrong.append("rows or documents that were never put")
        return seen

    def _uses(self, store: DiskStore, rows: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the chunks that rows use; -1 where the two tables of it do not agree."""
        numbers, found = {key(number).content: number for number in USED}, []
        with store.tables.read() as txn:
            for row in (row.to_bytes(8, "big") for row in rows):
                content = txn.get("used", row) or b""
                agree = txn.get("uses", content + row) is not None
                found.append(numbers.get(content, -1) if agree else -1)
        return tuple(found)

    def _check_store(self, store: DiskStore, chunks: int) -> None:
        wrong, path = self.outcome.wrong, store.tables.path
        wrong.extend(f"verify: {digest[:12]} {what}" for digest, what in store.verify().items())
        if store.stats().chunks != chunks or len(list(store.keys())) != chunks:
            wrong.append(f"{store.stats().chunks} chunks counted, {chunks} found")
        with store.tables.read() as txn:
            headers = [decode_header(record) for _, record in txn.items("headers")]
            uses = txn.count("uses")
        used = [sum(len(uses) for _, uses in state.documents.values()) for state in self.allowed]
        if uses not in used:
            wrong.append(f"{uses} uses of chunks, where documents have {used}")
        named = {header.file for header in headers if isinstance(header, Header)} - {""}
        there = {file.name for file in (path / "kv").rglob("*") if file.is_file()}
        if there != named:
            wrong.append(f"{len(there - named)} files that no header names")
        if list(path.rglob("data.mdb")) != [store.tables.file]:
            wrong.append("more than one data.mdb")


def _is(found: ChunkKV | Miss, number: int, version: int) -> bool:
    return not isinstance(found, Miss) and same(found, kv(number, version))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
