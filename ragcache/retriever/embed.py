"""Embedding models: the protocol, sentence-transformers, and a reference that needs no model.

Vectors are L2-normalised float32: their inner product is their cosine similarity.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ragcache.errors import ConfigError, ModelError
from ragcache.retriever.embedder_files import PACKAGED, model_folder
from ragcache.retriever.sentence_models import load_model
from ragcache.text import replace_surrogates
from ragcache.types import Progress

__all__ = ["DigestedEmbedder", "Embedder", "SentenceTransformerEmbedder"]

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """An embedding model, as the retriever uses it.

    Vectors of two embedders are comparable if and only if their ``dimension`` is the same and their
    ``digest`` is the same too. Where one of them has no digest, their ``name`` must be the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str], *, progress: Progress | None = None) -> Vectors:
        """Embed texts; returns float32 (len(texts), dimension).

        Each row has length 1, or is zero for a text in which the embedder finds no content.
        ``progress`` is called after every batch. Deterministic: the same list of texts gives the
        same vectors.
        """
        ...


@runtime_checkable
class DigestedEmbedder(Embedder, Protocol):
    """An embedder that can be identified by its content, wherever its files are."""

    @property
    def digest(self) -> str:
        """Hex digest of everything that its vectors depend on."""
        ...


@runtime_checkable
class QuestionEmbedder(Embedder, Protocol):
    """An embedder that encodes questions differently from documents."""

    def embed_question(self, question: str) -> Vectors:
        """The query vector, float32 (dimension,), of length 1 or 0."""
        ...


class SentenceTransformerEmbedder:
    """A sentence-transformers model: the packaged one, a model of the hub, or a local folder.

    The prompts that a model defines for queries and documents are applied. Texts are truncated to
    ``max_tokens`` tokens (256 for the packaged model), and a warning says how many were, because
    the truncated part cannot be found. ``device`` is a torch device; None chooses the fastest one.
    A model's own code is never run, and weights are read from safetensors only. ``digest`` is a
    hash of the model's files, independent of their location.

    Raises ConfigError if the packaged model is requested but not installed, and ModelError if a
    model cannot be loaded.
    """

    def __init__(self, name: str = PACKAGED, device: str | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
        self.name = name
        self.batch_size = batch_size
        folder = model_folder(name)
        from sentence_transformers import SentenceTransformer

        self._model, self.digest = load_model(
            SentenceTransformer,
            "embedding model",
            name,
            folder,
            device,
            instead=f'a folder, or {PACKAGED} (`pip install "ragcache-fusion[demo]"`)',
            unused="pooler.",
        )
        dimension = self._model.get_embedding_dimension()
        if not dimension:
            raise ModelError(f"{name} has no fixed embedding dimension. Choose another model.")
        self.dimension = int(dimension)

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text that the model reads; None if it has no limit."""
        length = self._model.max_seq_length
        return None if length is None else int(length)

    def embed(self, texts: Sequence[str], *, progress: Progress | None = None) -> Vectors:
        """See :class:`Embedder`. Raises ModelError if a vector is not finite."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        # Batching texts of similar length keeps padding, and so computation, small.
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
        truncated = 0
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = [replace_surrogates(texts[i]) for i in rows]
            vectors[rows] = self._model.encode_document(
                batch, batch_size=self.batch_size, convert_to_numpy=True, show_progress_bar=False
            )
            truncated += self._count_truncated(batch)
            if progress is not None:
                progress(start + len(rows), len(texts))
        if truncated:
            logger.warning(
                "%d of %d texts are longer than the %s tokens that %s reads: only their beginning "
                "can be found. Split into smaller chunks, or choose a model that reads more.",
                *(truncated, len(texts), self.max_tokens, self.name),
            )
        return _l2_normalize(vectors, self.name)

    def embed_question(self, question: str) -> Vectors:
        """See :class:`QuestionEmbedder`."""
        vector = self._model.encode_query(
            [replace_surrogates(question)], convert_to_numpy=True, show_progress_bar=False
        )
        row: Vectors = _l2_normalize(np.asarray(vector, np.float32), self.name)[0]
        return row

    def _count_truncated(self, texts: list[str]) -> int:
        if self.max_tokens is None:
            return 0
        tokenizer: Any = self._model.tokenizer
        # A token has at least one character, so short texts need no tokenizer.
        long = [text for text in texts if len(text) > self.max_tokens - 2]
        ids = tokenizer(long, truncation=False, verbose=False)["input_ids"] if long else []
        return sum(len(row) > self.max_tokens for row in ids)


def _l2_normalize(vectors: Vectors, name: str) -> Vectors:
    if not np.isfinite(vectors).all():
        raise ModelError(f"{name} gave a vector that is not finite. Load it in float32.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    norms[norms == 0] = 1
    unit: Vectors = vectors / norms
    return unit


class HashEmbedder:
    """The hashing trick over words: no model, no download, the same vectors on every machine.

    Each word (lower case, letters and digits) adds ``sign * (1 + ln(count))`` to one of
    ``dimension`` components; component and sign follow from the word's hash (Weinberger et al.,
    arXiv:0902.2206). Texts are similar if they share words. The reference implementation of
    :class:`Embedder`; a text without words has the zero vector.
    """

    def __init__(self, dimension: int = 256):
        if dimension < 1:
            raise ConfigError(f"dimension is {dimension}: it must be at least 1")
        self.dimension = dimension
        self.name = f"hash-{dimension}"

    def embed(self, texts: Sequence[str], *, progress: Progress | None = None) -> Vectors:
        """See :class:`Embedder`."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word, count in sorted(
                Counter(re.findall(r"\w+", replace_surrogates(text).casefold())).items()
            ):
                component, sign = self._component(word)
                vectors[row, component] += sign * (1 + log(count))
        if progress is not None and texts:
            progress(len(texts), len(texts))
        return _l2_normalize(vectors, self.name)

    def _component(self, word: str) -> tuple[int, int]:
        from xxhash import xxh3_64_intdigest

        digest = xxh3_64_intdigest(word.encode())
        return (digest >> 1) % self.dimension, 1 if digest & 1 else -1
