"""What was indexed: documents, the texts of their chunks, and their vectors.

Lives in the same tables as the KV, so that a store is one directory, and one commit changes both.
A document has a record (documents.py), every chunk a row (rows.py), and every row says which KV it
uses, by content (uses.py); KV that the last row has let go of goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ragcache.store.catalog import documents, promises, references
from ragcache.store.catalog.chunks import (
    add_rows,
    all_vectors,
    chunk_of,
    dimension,
    remove_row,
    rows_after,
    vectors_of,
)
from ragcache.store.catalog.documents import Entry, Indexed
from ragcache.store.lmdb.counters import number, set_number
from ragcache.text import decode_text, encode_text
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from ragcache.store.base import Change
    from ragcache.store.lmdb.tables import Tables, Transaction

__all__ = ["Catalog", "Entry", "HasTables"]


class HasTables(Protocol):
    """A store whose directory, or memory, a catalog can share."""

    @property
    def tables(self) -> Tables: ...

    def change(self) -> AbstractContextManager[Change]: ...


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
            promises.overtake(change.txn, document.id)
            return _put(change, document, chunks, vectors, source_digest, contents, expires, pinned)

    def put_promised(
        self,
        promise: int,
        document: Document,
        chunks: Sequence[Chunk],
        vectors: NDArray[np.float32],
        source_digest: bytes,
        *,
        contents: Sequence[bytes] = (),
        expires: float | None = None,
        pinned: bool = False,
    ) -> bool:
        """As :meth:`put_document`, where nobody has put or deleted the document since it was
        promised; else nothing is changed, and this is False."""
        _check(document, chunks, vectors)
        with self._store.change() as change:
            if not promises.stands(change.txn, document.id, promise):
                return False
            promises.overtake(change.txn, document.id, promise)
            _put(change, document, chunks, vectors, source_digest, contents, expires, pinned)
        return True

    def promise(self, document_ids: Iterable[str]) -> int:
        """Say that these will be written: now in the order of writes, later in fact. The number of
        the promise, for :meth:`put_promised`; see promises.py."""
        with self._tables.write() as txn:
            return promises.make(txn, document_ids)

    def promised(self, promise: int, document_ids: Iterable[str]) -> list[str]:
        """Those that nobody has written since they were promised."""
        with self._tables.read() as txn:
            return [one for one in document_ids if promises.stands(txn, one, promise)]

    def withdraw(self, promise: int, document_ids: Iterable[str]) -> None:
        """Nothing more will be written under that promise."""
        with self._tables.write() as txn:
            promises.withdraw(txn, document_ids, promise)

    def withdraw_others(self, kept: set[int]) -> None:
        """The same, of all promises but those ``kept``."""
        with self._tables.read() as txn:
            gone = promises.numbers(txn) - kept
        if gone:
            with self._tables.write() as txn:
                promises.withdraw_all(txn, gone)

    def confirm(
        self,
        document_id: str,
        source_digest: bytes,
        *,
        expires: float | None = None,
        pinned: bool | None = None,
        promise: int | None = None,
    ) -> bool:
        """Put a document as it is already, but for how long it is kept where that is given.

        False, with nothing changed, where it has another digest, or is gone; or where ``promise``
        is given and somebody has written the document since.
        """
        with self._tables.read() as txn:
            waits = promises.any_stands(txn, document_id)
            if not waits and expires is None and pinned is None:
                found = documents.find(txn, document_id)
                return (
                    promise is None and found is not None and (found.source_digest == source_digest)
                )
        with self._tables.write() as txn:
            found = documents.find(txn, document_id)
            if found is None or found.source_digest != source_digest:
                return False
            if promise is not None and not promises.stands(txn, document_id, promise):
                return False
            promises.overtake(txn, document_id, promise)
            _keep(txn, found, expires, pinned)
        return True

    def use(self, document_id: str, contents: Sequence[bytes]) -> None:
        """Say which KV a document's chunks use too: that of another model, as a rule.

        Passed over where the document is gone, or has another number of chunks by now.
        """
        with self._tables.read() as txn:
            known = documents.find(txn, document_id)
            if known is None or len(known.rows) != len(contents):
                return
            used = [
                references.is_used(txn, r, c) for r, c in zip(known.rows, contents, strict=True)
            ]
        if all(used):
            return
        with self._tables.write() as txn:
            now = documents.find(txn, document_id)
            if now is None or now.rows != known.rows:
                return
            for row, content in zip(now.rows, contents, strict=True):
                references.add(txn, row, content, pinned=now.pinned)

    def delete_document(self, document_id: str) -> bool:
        """Remove a document, its chunks, and the KV that no other uses; True if it was there, or
        was promised."""
        with self._store.change() as change:
            promised = promises.overtake(change.txn, document_id)
            return _delete(change, document_id) or promised

    def let_go(self, contents: Iterable[bytes]) -> None:
        """Take out the KV of those ``contents`` that no document uses."""
        if wanted := set(contents):
            with self._store.change() as change:
                references.drop_unused(change, wanted)

    def keep(
        self, document_id: str, *, expires: float | None = None, pinned: bool | None = None
    ) -> bool:
        """Change how long a document is kept, where that is given; False if it is not there."""
        with self._tables.write() as txn:
            document = documents.find(txn, document_id)
            if document is None:
                return False
            _keep(txn, document, expires, pinned)
        return True

    def refusal(self) -> str | None:
        """Why nothing can be written now; None where it can."""
        return self._tables.refusal()

    def over(self, now: float) -> list[str]:
        """Ids of the documents whose time is over and that are still there. Cheap while there are
        none."""
        with self._tables.read() as txn:
            if not documents.may_be_over(txn, now):
                return []
            return sorted(d.id for d in documents.every(txn) if d.is_over(now))

    def expire(self, now: float) -> list[str]:
        """Delete the documents whose time is over; their ids. Cheap while there are none."""
        with self._tables.read() as txn:
            if not documents.may_be_over(txn, now):
                return []
        over = self.over(now)
        gone = [document_id for document_id in over if self._delete_expired(document_id, now)]
        with self._tables.write() as txn:
            documents.set_next_expiry(txn)
        return gone

    def _delete_expired(self, document_id: str, now: float) -> bool:
        with self._store.change() as change:
            document = documents.find(change.txn, document_id)
            if document is None or not document.is_over(now):
                return False  # it was given more time meanwhile
            return _delete(change, document_id)

    def entry(self, document_id: str) -> Entry | None:
        """What is known of a document; None where there is no such one."""
        with self._tables.read() as txn:
            found = documents.find(txn, document_id)
        return None if found is None else found.entry

    def entries(self) -> list[Entry]:
        """All documents, by id."""
        with self._tables.read() as txn:
            found = [document.entry for document in documents.every(txn)]
        return sorted(found, key=lambda entry: entry.id)

    def contents(self) -> set[bytes]:
        """Content digests of everything that documents use."""
        with self._tables.read() as txn:
            return references.contents(txn)

    @property
    def size(self) -> tuple[int, int]:
        """How many documents there are, and how many chunks they have."""
        with self._tables.read() as txn:
            return txn.count("documents"), txn.count("chunks")

    def document_digest(self, document_id: str) -> bytes | None:
        """The ``source_digest`` it was put with; None where there is no such document."""
        with self._tables.read() as txn:
            found = documents.find(txn, document_id)
        return None if found is None else found.source_digest

    def rows_of(self, document_id: str) -> list[int]:
        """Rows of a document's chunks, in order; empty where there is no such document."""
        with self._tables.read() as txn:
            found = documents.find(txn, document_id)
        return [] if found is None else list(found.rows)

    def chunk(self, row: int) -> Chunk:
        """Raises KeyError for a row whose document was replaced or deleted."""
        return self.chunks([row])[0]

    def chunks(self, rows: Iterable[int]) -> list[Chunk]:
        """One chunk per row, in the order asked, all of one state of the catalog."""
        with self._tables.read() as txn:
            return [chunk_of(txn, int(row)) for row in rows]

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        """Up to ``most`` rows behind row ``after`` with their chunks, ascending."""
        with self._tables.read() as txn:
            return [(row, chunk_of(txn, row)) for row in rows_after(txn, after, most)]

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All rows, ascending, (n,), and their vectors, (n, dimension): to rebuild an index."""
        with self._tables.read() as txn:
            return all_vectors(txn)

    def vectors_of(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Vectors of rows, in the order asked, (len(rows), dimension), of one state of the catalog.
        Raises KeyError for a row whose document was replaced or deleted."""
        with self._tables.read() as txn:
            return vectors_of(txn, rows)

    @property
    def generation(self) -> int:
        """Changes of documents so far."""
        with self._tables.read() as txn:
            return number(txn, "generation")

    @property
    def dimension(self) -> int | None:
        """Length of every vector; None while there are none, and any is welcome."""
        with self._tables.read() as txn:
            return dimension(txn)

    def get_setting(self, name: str) -> str | None:
        """What ``put_setting`` recorded, such as the embedder's name."""
        with self._tables.read() as txn:
            value = txn.get("settings", encode_text(name))
        return None if value is None else decode_text(value)

    def put_setting(self, name: str, value: str) -> None:
        """Record a small text. ``name``: 1 to 511 bytes of UTF-8."""
        if not 0 < len(encode_text(name)) <= 511:
            raise ValueError(f"a setting's name takes 1 to 511 bytes, not {len(encode_text(name))}")
        with self._tables.write() as txn:
            txn.put("settings", encode_text(name), encode_text(value))

    def settings(self, prefix: str) -> dict[str, str]:
        """All that was recorded under names that begin so, by name."""
        with self._tables.read() as txn:
            names = list(txn.keys("settings", encode_text(prefix)))
            return {
                decode_text(name): decode_text(txn.get("settings", name) or b"") for name in names
            }

    def put_text(self, name: str, text: str) -> None:
        """Keep a text of any length under a name of up to 511 bytes, until :meth:`drop_text`."""
        with self._tables.write() as txn:
            txn.put("texts", encode_text(name), encode_text(text))

    def get_text(self, name: str) -> str | None:
        """What ``put_text`` kept; None where there is nothing. Earlier releases kept texts among
        the settings."""
        with self._tables.read() as txn:
            kept = txn.get("texts", encode_text(name))
        return self.get_setting(name) if kept is None else decode_text(kept)

    def drop_text(self, name: str) -> bool:
        """Forget it; True if there was something."""
        with self._tables.write() as txn:
            here = txn.delete("texts", encode_text(name))
            return txn.delete("settings", encode_text(name)) or here

    def drop_setting(self, name: str) -> bool:
        """Forget what was recorded; True if there was something."""
        with self._tables.write() as txn:
            return txn.delete("settings", encode_text(name))


def _check(document: Document, chunks: Sequence[Chunk], vectors: NDArray[np.float32]) -> None:
    if vectors.ndim != 2 or len(vectors) != len(chunks) or (chunks and not vectors.shape[1]):
        raise ValueError(f"{len(chunks)} chunks but vectors of shape {vectors.shape}")
    if vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of {document.id} must be finite float32")
    strangers = {chunk.document for chunk in chunks} - {document.id}
    if strangers:
        raise ValueError(f"chunks of {', '.join(sorted(strangers))} put under {document.id}")


def _put(
    change: Change,
    document: Document,
    chunks: Sequence[Chunk],
    vectors: NDArray[np.float32],
    source_digest: bytes,
    contents: Sequence[bytes],
    expires: float | None,
    pinned: bool,
) -> list[int]:
    txn = change.txn
    let_go = _remove(txn, document.id)
    rows = add_rows(txn, chunks, vectors)
    for row, content in zip(rows, contents, strict=bool(contents)):
        references.add(txn, row, content, pinned=pinned)
    metadata = dict(document.metadata)
    documents.put(txn, Indexed(document.id, metadata, source_digest, rows, expires, pinned))
    references.drop_unused(change, let_go)
    _changed(txn)
    return list(rows)


def _keep(txn: Transaction, document: Indexed, expires: float | None, pinned: bool | None) -> None:
    """Change how long a document is kept, where that is given."""
    if expires is not None:
        document = replace(document, expires=expires)
    if pinned is not None:
        document = replace(document, pinned=pinned)
        for row in document.rows:
            references.pin(txn, row, pinned)
    documents.put(txn, document)


def _delete(change: Change, document_id: str) -> bool:
    if documents.find(change.txn, document_id) is None:
        return False
    references.drop_unused(change, _remove(change.txn, document_id))
    _changed(change.txn)
    return True


def _remove(txn: Transaction, document_id: str) -> set[bytes]:
    """Take a document out, if it is there; the contents that it has let go of."""
    document = documents.find(txn, document_id)
    if document is None:
        return set()
    let_go = set()
    for row in document.rows:
        let_go.update(references.release(txn, row))
        remove_row(txn, row)
    documents.remove(txn, document_id)
    return let_go


def _changed(txn: Transaction) -> None:
    set_number(txn, "generation", number(txn, "generation") + 1)
