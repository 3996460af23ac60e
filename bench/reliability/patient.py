"""The store whose bits are flipped, and all operations on it afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from bench.reliability.child import Send
from bench.reliability.samples import Wrong, chunk_key, put, version_of
from ragcache.errors import StoreError
from ragcache.retriever.embed import HashEmbedder
from ragcache.store import Catalog, DiskStore, Miss
from ragcache.store.disk.store import Layout
from ragcache.types import Chunk, Document

CHUNKS = 8
NEWEST = 2  # the version of every chunk
EMBEDDER = HashEmbedder(32)
TEXTS = [f"text {number} of a document that is told apart" for number in range(CHUNKS)]
_LONGEST = 20  # seconds that a child may take


def fill(path: Path, layout: Layout) -> None:
    """A compacted store of :data:`CHUNKS` chunks, each put twice, and a document that uses them."""
    with DiskStore(path, layout=layout) as store:
        for version in range(1, NEWEST + 1):
            for number in range(CHUNKS):
                put(store, number, version)
        chunks = [Chunk("document", n, text) for n, text in enumerate(TEXTS)]
        contents = [chunk_key(number).content for number in range(CHUNKS)]
        Catalog(store).put_document(
            Document("document", "text"), chunks, EMBEDDER.embed(TEXTS), b"", contents=contents
        )
        store.compact()
        put(store, 0, NEWEST)


def served_all(store: DiskStore, but: Collection[int] = ()) -> str:
    """The worst result of all chunks: right, older or miss."""
    verdicts = {"right"}
    for number in set(range(CHUNKS)).difference(but):
        found = store.get(chunk_key(number))
        if isinstance(found, Miss):
            verdicts.add("miss")
        elif version_of(found) != NEWEST:
            verdicts.add("older")
    return min(verdicts)  # by luck in the order of the alphabet


def opened(path: Path, *, readonly: bool = False) -> str:
    try:
        with DiskStore(path, readonly=readonly) as store:
            verdict = served_all(store)
            return "damaged" if store.verify() else "empty" if verdict == "miss" else verdict
    except StoreError:
        return "StoreError"
    except Exception as error:
        return type(error).__name__


def use(path: Path, send: Send) -> None:
    """Everything that can be done with a store, one after another."""
    signal.alarm(_LONGEST)
    for readonly in (True, False):
        try:
            with DiskStore(path, readonly=readonly) as store:
                for work in (read_all, texts, change) if not readonly else (read_all, texts):
                    tell(send, store, work)
        except StoreError:
            send("StoreError")


def tell(send: Send, store: DiskStore, work: Callable[[DiskStore], str]) -> None:
    try:
        send(work(store))
    except StoreError:
        send("StoreError")
    except Wrong:
        send("WRONG: KV that nobody put")
    except Exception as error:
        send(f"WRONG: {type(error).__name__} from {work.__name__}")


def read_all(store: DiskStore) -> str:
    bad = store.verify()
    verdict = served_all(store)
    return "miss" if bad and verdict == "right" else verdict


def texts(store: DiskStore) -> str:
    catalog = Catalog(store)
    try:
        chunks = catalog.chunks(catalog.rows_of("document"))
    except KeyError:
        return "miss"
    known = catalog.rows_of("document")
    rows, vectors = catalog.vectors()
    if [c.text for c in chunks] != TEXTS[: len(chunks)]:
        return "WRONG: a text that nobody put"
    places = [known.index(row) if row in known else -1 for row in rows.tolist()]
    if len(set(places) - {-1}) != len(places):
        return "WRONG: a row that nobody put"
    if not np.array_equal(vectors, EMBEDDER.embed(TEXTS)[places]):
        return "WRONG: a vector that nobody put"
    return "right" if len(chunks) == len(rows) == len(TEXTS) else "miss"


def change(store: DiskStore) -> str:
    store.verify(repair=True)
    store.delete(chunk_key(1))
    put(store, 1, NEWEST)
    Catalog(store).delete_document("document")
    for number in range(CHUNKS):
        put(store, number, NEWEST)
    store.compact()
    return "right" if served_all(store) == "right" else "miss"
