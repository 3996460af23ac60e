"""The checked-in store of format 1; ``python -m tests.store.fixture FOLDER`` makes another one.

The one that is checked in is never made again: it is what version 1 was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ragcache.store import Catalog, ChunkKey, DiskStore
from ragcache.store.key import variant_key
from ragcache.types import Chunk, ChunkNotes, Document, Fingerprint
from tests.store.samples import MODEL, make_key, make_kv

V1 = Path(__file__).parent / "fixtures" / "v1"
RECORDS, FILE = make_key(1), make_key(2, context=(7, 8))
VARIANT = variant_key(MODEL, RECORDS.tokens, (9, 9), "")
NOTES = ChunkNotes((b"\1" * 32, b"\2" * 32), (0.25, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5), 0.75)
CODED = {
    codec: ChunkKey(Fingerprint((("codec", codec), ("weights", "a8b6")), "tiny"), (3, 1, 4, 1, 5))
    for codec in ("int8", "fp8", "cachegen")
}
#: blake3 of what they decode to, float32, keys before values: lossy, but always the same loss.
DECODED = {"int8": "427060fab787b102", "fp8": "aa3a16db6ebb148f", "cachegen": "851f502287f57f4f"}
DOCUMENT = Document("notes.txt", "One. Two.", {"page": "1"})
CHUNKS = [Chunk("notes.txt", n, text, {"page": "1"}) for n, text in enumerate(("One.", "Two."))]
VECTORS = np.array([[1, 0, 0, 0], [0, 0.6, 0.8, 0]], np.float32)
EXPIRES = 4102444800.0  # 2100


def make(path: Path) -> None:
    """Write the store: chunks of both layouts and of every codec, a variant, a document."""
    with DiskStore(path, layout="files") as store:
        store.put(FILE, make_kv(FILE))
        store.layout = "records"
        for key in (RECORDS, *CODED.values()):
            store.put(key, make_kv(key))
        store.variants.put(VARIANT, make_kv(VARIANT, seed=1), NOTES)
        store.variants.add_score({VARIANT: 2.5})
        catalog = Catalog(store)
        contents = [RECORDS.content, FILE.content]
        catalog.put_document(
            DOCUMENT,
            CHUNKS,
            VECTORS,
            b"digest",
            contents=contents,
            expires=EXPIRES,
            pinned=True,
        )
        catalog.put_setting("model", "tiny")
        store.compact()
    for lock in path.rglob("*lock*"):
        lock.unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
