"""What was indexed: documents, the texts of their chunks, and their vectors.

Lives in the same tables as the KV, so that a store is one directory, and one commit changes both.
Every chunk has a row: an integer that is never given twice, which is also its id in the vector
index. A row says which KV it uses, by content; KV that the last row has let go of goes with it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ragcache.errors import ConfigError, StoreError
from ragcache.store.sealed import as_json, get_sealed, put_sealed
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from ragcache.store.base import Change
    from ragcache.store.tables import Tables, Transaction

_NUMBER = struct.Struct("<Q")
_CONTENT = 32  # bytes of ChunkKey.content
_FLOATS = np.dtype("<f4")


class HasTables(Protocol):
    """A store whose directory, or memory, a catalog can share."""

    @property
    def tables(self) -> Tables: ...

    def change(self) -> AbstractContextManager[Change]: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """What the catalog knows of a document."""

    id: str
    chunks: int
    metadata: Mapping[str, str]
    expires: float | None  # seconds since the epoch; None: never
    pinned: bool  # its KV is not evicted


class Catalog:
    """Documents and chunks beside the KV of ``store``, which closes it. Thread-safe.

    ``generation`` changes with every change of documents: an index that was built at another
    generation is out of date. Records carry checksums; a damaged one raises StoreError.
    """

    def __init__(self, store: HasTables) -> None:
        self._store, self._tables = store, store.tables

    def put_document(
        self,
        document: Document,
        chunks: Sequence[Chunk],
        vectors: NDArray[np.float32],
        source_digest: bytes,
        *,
        contents: Sequence[bytes] = (),
        expires: float | None = None,
        pinned: bool = False,
    ) -> list[int]:
        """Replace a document and its chunks, all or nothing; durable on return. Gives their rows.

        ``vectors`` is (len(chunks), dimension). ``source_digest`` is for the caller: whatever
        tells that the document need not be indexed again. ``contents`` says which KV each chunk
        uses (:attr:`ChunkKey.content`); KV that only the replaced chunks used is gone afterwards.
        ``expires``: seconds since the epoch, see :meth:`expire`. ``pinned``: its KV is not evicted.
        Raises ConfigError for vectors of another dimension than those that are there.
        """
        _check(document, chunks, vectors)
        with self._store.change() as change:
            txn = change.txn
            let_go = _remove(txn, document.id)
            if chunks:
                _claim_dimension(txn, vectors.shape[1])
            first = _number(txn, "next_row")
            rows = list(range(first, first + len(chunks)))
            _set_number(txn, "next_row", first + len(chunks))
            for row, chunk, vector in zip(rows, chunks, vectors, strict=True):
                fields = [chunk.document, chunk.ordinal, chunk.text, dict(chunk.metadata)]
                put_sealed(txn, "chunks", _row_key(row), as_json(fields))
                put_sealed(txn, "vectors", _row_key(row), vector.astype(_FLOATS).tobytes())
            for row, content in zip(rows, contents, strict=bool(contents)):
                _use(txn, row, content, pinned)
            entry = {
                "id": document.id,
                "metadata": dict(document.metadata),
                "digest": source_digest.hex(),
                "rows": [first, len(chunks)],
                "expires": expires,
                "pinned": pinned,
            }
            put_sealed(txn, "documents", _document_key(document.id), as_json(entry))
            _expires(txn, expires)
            _drop_unused(change, let_go)
            _changed(txn)
        return rows

    def use(self, document_id: str, contents: Sequence[bytes]) -> None:
        """Say which KV a document's chunks use too: that of another model, as a rule.

        Passed over where the document is gone, or has another number of chunks by now.
        """
        with self._tables.read() as txn:
            entry = _entry(txn, document_id)
            if entry is None or entry["rows"][1] != len(contents):
                return
            rows = range(entry["rows"][0], sum(entry["rows"]))
            known = [_is_used(txn, row, c) for row, c in zip(rows, contents, strict=True)]
        if all(known):
            return
        with self._tables.write() as txn:
            now = _entry(txn, document_id)
            if now is None or now["rows"] != entry["rows"]:
                return
            for row, content in zip(rows, contents, strict=True):
                _use(txn, row, content, now["pinned"])

    def delete_document(self, document_id: str) -> bool:
        """Remove a document, its chunks, and the KV that no other uses; True if it was there."""
        with self._store.change() as change:
            return _delete(change, document_id)

    def let_go(self, contents: Iterable[bytes]) -> None:
        """Take out the KV of those ``contents`` that no document uses."""
        if wanted := set(contents):
            with self._store.change() as change:
                _drop_unused(change, wanted)

    def keep(
        self, document_id: str, *, expires: float | None = None, pinned: bool | None = None
    ) -> bool:
        """Change how long a document is kept, where that is given; False if it is not there."""
        with self._tables.write() as txn:
            entry = _entry(txn, document_id)
            if entry is None:
                return False
            if expires is not None:
                entry["expires"] = expires
            if pinned is not None:
                entry["pinned"] = pinned
                first, count = entry["rows"]
                for row in range(first, first + count):
                    for content in _contents(txn, row):
                        _pin(txn, row, content, pinned)
            _expires(txn, entry["expires"])
            put_sealed(txn, "documents", _document_key(document_id), as_json(entry))
        return True

    def expire(self, now: float) -> list[str]:
        """Delete the documents whose time is over; their ids. Cheap while there are none."""
        with self._tables.read() as txn:
            next_expiry = _number(txn, "next_expiry")
        if not next_expiry or next_expiry > 1000 * now:
            return []
        over = [e.id for e in self.entries() if e.expires is not None and e.expires <= now]
        gone = [document_id for document_id in over if self._delete_expired(document_id, now)]
        with self._tables.write() as txn:
            left = [e.expires for e in _entries(txn) if e.expires is not None]
            _set_number(txn, "next_expiry", _milliseconds(min(left)) if left else 0)
        return gone

    def _delete_expired(self, document_id: str, now: float) -> bool:
        with self._store.change() as change:
            entry = _entry(change.txn, document_id)
            if entry is None or entry["expires"] is None or entry["expires"] > now:
                return False  # it was given more time meanwhile
            return _delete(change, document_id)

    def entry(self, document_id: str) -> Entry | None:
        """What is known of a document; None where there is no such one."""
        with self._tables.read() as txn:
            found = _entry(txn, document_id)
        return None if found is None else _as_entry(found)

    def entries(self) -> list[Entry]:
        """All documents, by id."""
        with self._tables.read() as txn:
            return sorted(_entries(txn), key=lambda entry: entry.id)

    def contents(self) -> set[bytes]:
        """Content digests of everything that documents use."""
        with self._tables.read() as txn:
            return {row[:_CONTENT] for row in txn.keys("uses")}

    def document_digest(self, document_id: str) -> bytes | None:
        """The ``source_digest`` it was put with; None where there is no such document."""
        with self._tables.read() as txn:
            entry = _entry(txn, document_id)
        return None if entry is None else bytes.fromhex(entry["digest"])

    def rows_of(self, document_id: str) -> list[int]:
        """Rows of a document's chunks, in order; empty where there is no such document."""
        with self._tables.read() as txn:
            entry = _entry(txn, document_id)
        if entry is None:
            return []
        first, count = entry["rows"]
        return list(range(first, first + count))

    def chunk(self, row: int) -> Chunk:
        """Raises KeyError for a row whose document was replaced or deleted."""
        return self.chunks([row])[0]

    def chunks(self, rows: Iterable[int]) -> list[Chunk]:
        """One chunk per row, in the order asked, all of one state of the catalog."""
        with self._tables.read() as txn:
            return [
                Chunk(*json.loads(get_sealed(txn, "chunks", _row_key(int(row))))) for row in rows
            ]

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        """Up to ``most`` rows behind row ``after`` with their chunks, ascending."""
        with self._tables.read() as txn:
            keys = islice(txn.keys("chunks", start=_row_key(after + 1)), most)
            return [
                (int.from_bytes(key, "big"), Chunk(*json.loads(get_sealed(txn, "chunks", key))))
                for key in keys
            ]

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All rows, ascending, (n,), and their vectors, (n, dimension): to rebuild an index."""
        with self._tables.read() as txn:
            dimension = _number(txn, "dimension") if txn.count("vectors") else 0
            rows, vectors = [], []
            for key in txn.keys("vectors"):
                vector = np.frombuffer(_vector(txn, key), _FLOATS)
                if len(vector) != dimension:
                    raise StoreError(
                        f"row {int.from_bytes(key, 'big')} in vectors has {len(vector)} numbers, "
                        f"not {dimension}: index its document again",
                        reason="corrupt",
                    )
                rows.append(int.from_bytes(key, "big"))
                vectors.append(vector)
        matrix = np.array(vectors, np.float32).reshape(len(rows), dimension)
        return np.array(rows, np.int64), matrix

    def vectors_of(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Vectors of rows, in the order asked, (len(rows), dimension), of one state of the catalog.
        Raises KeyError for a row whose document was replaced or deleted."""
        with self._tables.read() as txn:
            found = [get_sealed(txn, "vectors", _row_key(row)) for row in rows]
            dimension = _number(txn, "dimension")
        return np.frombuffer(b"".join(found), _FLOATS).reshape(len(rows), dimension)

    @property
    def generation(self) -> int:
        """Changes of documents so far."""
        with self._tables.read() as txn:
            return _number(txn, "generation")

    @property
    def dimension(self) -> int | None:
        """Length of every vector; None while there are none, and any is welcome."""
        with self._tables.read() as txn:
            return _number(txn, "dimension") if txn.count("vectors") else None

    def get_setting(self, name: str) -> str | None:
        """What ``put_setting`` recorded, such as the embedder's name."""
        with self._tables.read() as txn:
            value = txn.get("settings", name.encode())
        return None if value is None else value.decode()

    def put_setting(self, name: str, value: str) -> None:
        """Record a small text. ``name``: 1 to 511 bytes of UTF-8."""
        if not 0 < len(name.encode()) <= 511:
            raise ValueError(f"a setting's name takes 1 to 511 bytes, not {len(name.encode())}")
        with self._tables.write() as txn:
            txn.put("settings", name.encode(), value.encode())

    def settings(self, prefix: str) -> dict[str, str]:
        """All that was recorded under names that begin so, by name."""
        with self._tables.read() as txn:
            names = list(txn.keys("settings", prefix.encode()))
            return {name.decode(): (txn.get("settings", name) or b"").decode() for name in names}

    def drop_setting(self, name: str) -> bool:
        """Forget what was recorded; True if there was something."""
        with self._tables.write() as txn:
            return txn.delete("settings", name.encode())


def _check(document: Document, chunks: Sequence[Chunk], vectors: NDArray[np.float32]) -> None:
    if vectors.ndim != 2 or len(vectors) != len(chunks) or (chunks and not vectors.shape[1]):
        raise ValueError(f"{len(chunks)} chunks but vectors of shape {vectors.shape}")
    if vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of {document.id} must be finite float32")
    strangers = {chunk.document for chunk in chunks} - {document.id}
    if strangers:
        raise ValueError(f"chunks of {', '.join(sorted(strangers))} put under {document.id}")


def _claim_dimension(txn: Transaction, dimension: int) -> None:
    known = _number(txn, "dimension")
    if txn.count("vectors") and dimension != known:
        raise ConfigError(
            f"vectors of dimension {dimension}, the catalog holds dimension {known}: use the "
            "embedder it was made with, or index everything again"
        )
    _set_number(txn, "dimension", dimension)


def _delete(change: Change, document: str) -> bool:
    if _entry(change.txn, document) is None:
        return False
    _drop_unused(change, _remove(change.txn, document))
    _changed(change.txn)
    return True


def _remove(txn: Transaction, document: str) -> set[bytes]:
    """Take a document out; the contents that it has let go of."""
    entry = _entry(txn, document)
    if entry is None:
        return set()
    let_go = set()
    first, count = entry["rows"]
    for row in range(first, first + count):
        for content in _contents(txn, row):
            let_go.add(content)
            txn.delete("uses", content + _row_key(row))
            txn.delete("pins", content + _row_key(row))
        for table in ("chunks", "vectors", "used"):
            txn.delete(table, _row_key(row))
    txn.delete("documents", _document_key(document))
    return let_go


def _drop_unused(change: Change, contents: set[bytes]) -> None:
    for content in contents:
        if next(change.txn.keys("uses", content), None) is None:
            change.forget_content(content)


def _changed(txn: Transaction) -> None:
    _set_number(txn, "generation", _number(txn, "generation") + 1)


def _expires(txn: Transaction, when: float | None) -> None:
    """Note that a document expires then: no later than that is :meth:`Catalog.expire` to look."""
    known = _number(txn, "next_expiry")
    if when is not None and (not known or _milliseconds(when) < known):
        _set_number(txn, "next_expiry", _milliseconds(when))


def _vector(txn: Transaction, key: bytes) -> bytes:
    try:
        return get_sealed(txn, "vectors", key)
    except KeyError as error:  # listed, and not there
        raise StoreError(
            "the table of vectors is damaged: index the documents again", reason="corrupt"
        ) from error


def _milliseconds(when: float) -> int:
    return max(1, int(1000 * when))


def _use(txn: Transaction, row: int, content: bytes, pinned: bool) -> None:
    if not _is_used(txn, row, content):
        txn.put("uses", content + _row_key(row), b"")
        txn.put("used", _row_key(row), (txn.get("used", _row_key(row)) or b"") + content)
    _pin(txn, row, content, pinned)


def _is_used(txn: Transaction, row: int, content: bytes) -> bool:
    return txn.view("uses", content + _row_key(row)) is not None


def _pin(txn: Transaction, row: int, content: bytes, pinned: bool) -> None:
    if pinned:
        txn.put("pins", content + _row_key(row), b"")
    else:
        txn.delete("pins", content + _row_key(row))


def _contents(txn: Transaction, row: int) -> list[bytes]:
    used = txn.get("used", _row_key(row)) or b""
    return [used[at : at + _CONTENT] for at in range(0, len(used), _CONTENT)]


def _entry(txn: Transaction, document: str) -> dict[str, Any] | None:
    key = _document_key(document)
    if txn.view("documents", key) is None:
        return None
    entry: dict[str, Any] = json.loads(get_sealed(txn, "documents", key))
    return entry


def _entries(txn: Transaction) -> list[Entry]:
    found = [json.loads(get_sealed(txn, "documents", key)) for key in txn.keys("documents")]
    return list(map(_as_entry, found))


def _as_entry(found: dict[str, Any]) -> Entry:
    return Entry(
        found["id"], found["rows"][1], found["metadata"], found["expires"], found["pinned"]
    )


def _document_key(document: str) -> bytes:
    """A digest, for ids may be longer than a key of LMDB."""
    return blake3(document.encode("utf-8", "surrogatepass")).digest()


def _row_key(row: int) -> bytes:
    if row < 0:  # what vector indexes give where they found too little
        raise ValueError(f"row {row}: rows count from 0")
    return row.to_bytes(8, "big")


def _number(txn: Transaction, name: str) -> int:
    record = txn.get("counters", name.encode())
    return int(_NUMBER.unpack(record)[0]) if record else 0


def _set_number(txn: Transaction, name: str, value: int) -> None:
    txn.put("counters", name.encode(), _NUMBER.pack(value))
