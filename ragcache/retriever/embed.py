"""Texts to vectors: the contract, sentence-transformers behind it, and a reference without a model.

Vectors are L2-normalised float32, so that their inner product is the cosine.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ragcache.errors import ConfigError, ModelError
from ragcache.models.file_cache import cached_text
from ragcache.models.memory import copy_to_memory, ensure_unchanged
from ragcache.models.silence import silence_transformers
from ragcache.retriever.embedder_files import PACKAGED, model_digest, model_files, model_folder
from ragcache.text import replace_surrogates
from ragcache.types import Progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """What the retriever asks of an embedding model.

    Vectors of two embedders may be compared exactly when their ``dimension`` agrees and so does
    their ``digest``, or where one of them has none, their ``name``.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str], *, progress: Progress | None = None) -> Vectors:
        """One vector per text, (len(texts), dimension), of length 1, or 0 for a text that has no
        content to the embedder. ``progress`` is called after every batch. Same list, same vectors.
        """
        ...


@runtime_checkable
class DigestedEmbedder(Embedder, Protocol):
    """An embedder that is known by what it computes with, wherever that is kept."""

    @property
    def digest(self) -> str:
        """Over everything that its vectors depend on."""
        ...


@runtime_checkable
class QuestionEmbedder(Embedder, Protocol):
    """An embedder that treats questions unlike the texts that answer them."""

    def embed_question(self, question: str) -> Vectors:
        """The vector to search with, (dimension,)."""
        ...


class SentenceTransformerEmbedder:
    """A model of sentence-transformers: the packaged one, one of a model hub, or one in a folder.

    The prompts that a model defines for queries and documents are applied. A text is cut at the
    model's ``max_tokens`` (256 for the packaged model); how many were cut is logged, for what is
    cut off cannot be found. ``device`` is torch's name of one; None takes the fastest there is.
    Code that comes with a model is never run, and weights are read from safetensors only.
    ``digest`` is over the model's files, wherever they lie.

    Raises ConfigError where the packaged model is asked for but not installed, ModelError where a
    model cannot be loaded.
    """

    def __init__(self, name: str = PACKAGED, device: str | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
        self.name = name
        self.batch_size = batch_size
        folder = model_folder(name)
        with ensure_unchanged(folder, model_files(folder)):
            self.digest = model_digest(folder)
            self._model = _load(name, folder, self.digest, device)
            copy_to_memory(self._model)
        dimension = self._model.get_embedding_dimension()
        if not dimension:
            raise ModelError(f"{name} does not say how long its vectors are. Choose another model.")
        self.dimension = int(dimension)

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the model reads of a text; None where it reads all."""
        length = self._model.max_seq_length
        return None if length is None else int(length)

    def embed(self, texts: Sequence[str], *, progress: Progress | None = None) -> Vectors:
        """See :class:`Embedder`. Raises ModelError where the model gives no finite vector."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        # Texts of like length together: little padding, so far less to compute.
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
        cut = 0
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = [replace_surrogates(texts[i]) for i in rows]
            vectors[rows] = self._model.encode_document(
                batch, batch_size=self.batch_size, convert_to_numpy=True, show_progress_bar=False
            )
            cut += self._cut(batch)
            if progress is not None:
                progress(start + len(rows), len(texts))
        if cut:
            logger.warning(
                "%d of %d texts are longer than the %s tokens that %s reads: only their beginning "
                "can be found. Split into smaller chunks, or choose a model that reads more.",
                *(cut, len(texts), self.max_tokens, self.name),
            )
        return _normalised(vectors, self.name)

    def embed_question(self, question: str) -> Vectors:
        """See :class:`QuestionEmbedder`."""
        vector = self._model.encode_query(
            [replace_surrogates(question)], convert_to_numpy=True, show_progress_bar=False
        )
        row: Vectors = _normalised(np.asarray(vector, np.float32), self.name)[0]
        return row

    def _cut(self, texts: list[str]) -> int:
        if self.max_tokens is None:
            return 0
        tokenizer: Any = self._model.tokenizer
        # A token has at least one character: most texts are told short without a tokenizer.
        long = [text for text in texts if len(text) > self.max_tokens - 2]
        ids = tokenizer(long, truncation=False, verbose=False)["input_ids"] if long else []
        return sum(len(row) > self.max_tokens for row in ids)


def _load(name: str, folder: Path, digest: str, device: str | None) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    versions = [f"{of} {version(of)}" for of in ("sentence-transformers", "transformers")]
    try:
        with silence_transformers():
            model = SentenceTransformer(
                str(folder),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
            missing = cached_text(
                "embedder", [digest, *versions], lambda: "\n".join(_missing(model))
            )
    # What the libraries below raise for a damaged or foreign model or a device: of any kind.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"The embedding model {name} cannot be loaded: {reason} "
            "Check the name or folder and the device; without access to a model hub use a folder, "
            f'or {PACKAGED} (`pip install "ragcache-fusion[demo]"`).'
        ) from error
    if missing:
        first, *others = missing.splitlines()
        raise ModelError(
            f"The embedding model {name} lacks {1 + len(others)} of its tensors, {first} for one: "
            "they would be random numbers. Get the model's files anew."
        )
    return model


def _missing(model: SentenceTransformer) -> Iterator[str]:
    """Tensors that the files do not have, and that vectors depend on: no pooler's, which nothing of
    sentence-transformers reads."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.name_or_path:
            loaded: Any = type(part).from_pretrained(
                part.name_or_path,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            _, found = loaded
            names = {*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])}
            yield from sorted(name for name in names if not name.startswith("pooler."))
            break  # what it is made of was loaded with it


def _normalised(vectors: Vectors, name: str) -> Vectors:
    if not np.isfinite(vectors).all():
        raise ModelError(f"{name} gave a vector that is not finite. Load it in float32.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    norms[norms == 0] = 1
    normalised: Vectors = vectors / norms
    return normalised


class HashEmbedder:
    """A hashed bag of words: no model, no download, the same on every machine.

    Each word (lower case, letters and digits) adds ``1 + ln(count)``, with a sign, to the one place
    of ``dimension`` that its hash names. Texts are near when they share words. The reference
    implementation of :class:`Embedder`; a text without words gets the zero vector.
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
                place, sign = self._place(word)
                vectors[row, place] += sign * (1 + log(count))
        if progress is not None and texts:
            progress(len(texts), len(texts))
        return _normalised(vectors, self.name)

    def _place(self, word: str) -> tuple[int, int]:
        from xxhash import xxh3_64_intdigest

        digest = xxh3_64_intdigest(word.encode())
        return (digest >> 1) % self.dimension, 1 if digest & 1 else -1
