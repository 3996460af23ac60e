"""The catalog: documents, the texts of their chunks, and their vectors.

It lives in the same tables as the KV, so that a store is one directory and one commit changes both.
A document has a record (documents.py) and every chunk a row (chunks.py); references.py records
which KV, by content, each row uses. Deleting a document and its unreferenced KV is one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ragcache.store.catalog import documents, promises, references
from ragcache.store.catalog.changes import (
    check_document,
    delete_document,
    replace_document,
    set_retention,
)
from ragcache.store.catalog.chunks import (
    all_rows,
    chunk_of,
    dimension,
    next_row,
    rows_after,
    vectors_after,
    vectors_of,
)
from ragcache.store.catalog.documents import DocumentEntry
from ragcache.store.catalog.texts import StoredTexts
from ragcache.store.lmdb.tables import get_counter
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from ragcache.store.base import Change
    from ragcache.store.lmdb.tables import Tables

__all__ = ["Catalog", "DocumentEntry", "DocumentToPut"]


class TableStore(Protocol):
    """A store whose tables a catalog can share."""

    @property
    def tables(self) -> Tables: ...

    def change(self) -> AbstractContextManager[Change]: ...


@dataclass(frozen=True, slots=True)
class DocumentToPut:
    """A document with its chunks, as :meth:`Catalog.put_document` takes them."""

    document: Document
    chunks: Sequence[Chunk]
    vectors: NDArray[np.float32]  # (len(chunks), dimension)
    source_digest: bytes
    contents: Sequence[bytes] = ()
    expires: float | None = None
    pinned: bool = False


class Catalog(StoredTexts):
    """Documents and their chunks, in the tables of ``store``, whose owner closes it. Thread-safe.

    ``generation`` changes with every change of documents: an index that was built at another
    generation is out of date. Records carry checksums; a damaged one raises StoreError.
    """

    def __init__(self, store: TableStore) -> None:
        super().__init__(store.tables)
        self._store = store

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
        promise: int | None = None,
    ) -> bool:
        """Replace a document and its chunks, all or nothing; durable on return.

        ``vectors`` is (len(chunks), dimension). ``source_digest`` identifies what was indexed, so
        that the caller can tell whether the document has changed. ``contents`` names the KV that
        each chunk uses (:attr:`ChunkKey.content`); KV that only the replaced chunks used is
        deleted. ``expires``: seconds since the epoch, see :meth:`expire`. ``pinned``: its KV is not
        evicted. With a ``promise`` (:meth:`promise`), returns False and changes nothing where the
        document was put or deleted since. Raises ConfigError for vectors of another dimension than
        the stored ones.
        """
        given = DocumentToPut(document, chunks, vectors, source_digest, contents, expires, pinned)
        return bool(self.put_documents([given], promise=promise))

    def put_documents(
        self, given: Sequence[DocumentToPut], *, promise: int | None = None
    ) -> list[str]:
        """As :meth:`put_document`, for several documents with one commit: all or nothing, but for
        those whose ``promise`` is not valid any more. Returns the ids of those that were put."""
        for one in given:
            check_document(one.document, one.chunks, one.vectors)
        put = []
        with self._store.change() as change:
            for one in given:
                document = one.document
                if promise is not None and not promises.is_valid(change.txn, document.id, promise):
                    continue
                promises.supersede(change.txn, document.id, promise)
                replace_document(
                    change,
                    document,
                    one.chunks,
                    one.vectors,
                    one.source_digest,
                    one.contents,
                    one.expires,
                    one.pinned,
                )
                put.append(document.id)
        return put

    def promise(self, document_ids: Iterable[str]) -> int:
        """Reserve the place of these documents in the order of writes, for a later
        :meth:`put_document`; the number of the promise. See promises.py."""
        with self._tables.write() as txn:
            return promises.make(txn, document_ids)

    def promised(self, promise: int, document_ids: Iterable[str]) -> list[str]:
        """The documents that were not put or deleted since they were promised."""
        with self._tables.read() as txn:
            return [one for one in document_ids if promises.is_valid(txn, one, promise)]

    def withdraw(self, promise: int, document_ids: Iterable[str]) -> None:
        """End a promise for these documents: nothing more will be put under it."""
        with self._tables.write() as txn:
            promises.withdraw(txn, document_ids, promise)

    def withdraw_others(self, kept: set[int]) -> None:
        """End all promises but those ``kept``, for all documents."""
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
        """As :meth:`put_document` for a document that has not changed, with a new retention where
        that is given.

        False, with nothing changed, where the stored document has another ``source_digest`` or is
        gone, or where it was put or deleted since ``promise``.
        """
        with self._tables.read() as txn:
            waits = promises.any_valid(txn, document_id)
            if not waits and expires is None and pinned is None:
                found = documents.find(txn, document_id)
                return (
                    promise is None and found is not None and (found.source_digest == source_digest)
                )
        with self._tables.write() as txn:
            found = documents.find(txn, document_id)
            if found is None or found.source_digest != source_digest:
                return False
            if promise is not None and not promises.is_valid(txn, document_id, promise):
                return False
            promises.supersede(txn, document_id, promise)
            set_retention(txn, found, expires, pinned)
        return True

    def add_references(self, document_id: str, contents: Sequence[bytes]) -> None:
        """Record the KV that a document's chunks also use, such as that of another model.

        Does nothing where the document is gone or has another number of chunks by now.
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
        """Delete a document, its chunks, and the KV that no other document uses; True if it was
        there or promised."""
        with self._store.change() as change:
            promised = promises.supersede(change.txn, document_id)
            return delete_document(change, document_id) or promised

    def delete_unused(self, contents: Iterable[bytes]) -> None:
        """Delete the KV of those ``contents`` that no document uses."""
        if wanted := set(contents):
            with self._store.change() as change:
                references.delete_unused(change, wanted)

    def set_retention(
        self, document_id: str, *, expires: float | None = None, pinned: bool | None = None
    ) -> bool:
        """Set when a document expires and whether its KV is pinned; None leaves a value as it is.
        False where there is no such document."""
        with self._tables.write() as txn:
            document = documents.find(txn, document_id)
            if document is None:
                return False
            set_retention(txn, document, expires, pinned)
        return True

    def refusal(self) -> str | None:
        """Why this process cannot write now; None where it can."""
        return self._tables.refusal()

    def expired(self, now: float) -> list[str]:
        """Ids of the documents that have expired and are not deleted yet. Cheap while there are
        none."""
        with self._tables.read() as txn:
            if not documents.may_have_expired(txn, now):
                return []
            return sorted(d.id for d in documents.all_records(txn) if d.is_expired(now))

    def expire(self, now: float) -> list[str]:
        """Delete the documents that have expired; their ids. Cheap while there are none."""
        with self._tables.read() as txn:
            if not documents.may_have_expired(txn, now):
                return []
        gone = [
            document_id
            for document_id in self.expired(now)
            if self._delete_expired(document_id, now)
        ]
        with self._tables.write() as txn:
            documents.update_next_expiry(txn)
        return gone

    def _delete_expired(self, document_id: str, now: float) -> bool:
        with self._store.change() as change:
            document = documents.find(change.txn, document_id)
            if document is None or not document.is_expired(now):
                return False  # its expiry was moved meanwhile
            return delete_document(change, document_id)

    def entry(self, document_id: str) -> DocumentEntry | None:
        """The entry of a document; None where there is no such document."""
        with self._tables.read() as txn:
            found = documents.find(txn, document_id)
        return None if found is None else found.entry

    def entries(self) -> list[DocumentEntry]:
        """All documents, by id."""
        with self._tables.read() as txn:
            found = [document.entry for document in documents.all_records(txn)]
        return sorted(found, key=lambda entry: entry.id)

    def described(self) -> list[tuple[Mapping[str, str], range]]:
        """The metadata of every document, and the rows of its chunks."""
        with self._tables.read() as txn:
            return [(found.metadata, found.rows) for found in documents.all_records(txn)]

    def contents(self) -> set[bytes]:
        """Content digests of all KV that documents use."""
        with self._tables.read() as txn:
            return references.contents(txn)

    def uses(self, content: bytes) -> bool:
        """Whether a document's chunk uses the KV of this content digest."""
        with self._tables.read() as txn:
            return references.has_uses(txn, content)

    @property
    def size(self) -> tuple[int, int]:
        """The number of documents, and of their chunks."""
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
        """The chunks of rows, in the order given, read in one transaction."""
        with self._tables.read() as txn:
            return [chunk_of(txn, int(row)) for row in rows]

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        """Up to ``most`` rows after row ``after`` with their chunks, ascending."""
        with self._tables.read() as txn:
            return [(row, chunk_of(txn, row)) for row in rows_after(txn, after, most)]

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All rows, ascending, (n,), and their vectors, (n, dimension), to rebuild an index."""
        with self._tables.read() as txn:
            return vectors_after(txn, -1, None)

    def vectors_after(self, row: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Up to ``most`` rows after row ``row``, ascending, (n,), and their vectors,
        (n, dimension)."""
        with self._tables.read() as txn:
            return vectors_after(txn, row, most)

    def rows(self) -> NDArray[np.int64]:
        """All rows, ascending, (n,)."""
        with self._tables.read() as txn:
            return all_rows(txn)

    @property
    def next_row(self) -> int:
        """The row that the next chunk will get. It is more than every row that there was: the rows
        of deleted chunks are not used again."""
        with self._tables.read() as txn:
            return next_row(txn)

    def vectors_of(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """The vectors of rows, in the order given, (len(rows), dimension), read in one transaction.
        Raises KeyError for a row whose document was replaced or deleted."""
        with self._tables.read() as txn:
            return vectors_of(txn, rows)

    @property
    def generation(self) -> int:
        """The number of changes of documents so far."""
        with self._tables.read() as txn:
            return get_counter(txn, "generation")

    @property
    def dimension(self) -> int | None:
        """The length of every vector; None while there are none."""
        with self._tables.read() as txn:
            return dimension(txn)
