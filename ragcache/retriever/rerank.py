"""Rerank chunks: a model reads the question and each chunk together, and scores the pair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ragcache.errors import ConfigError, ModelError
from ragcache.retriever.embedder_files import cross_encoder_folder
from ragcache.retriever.sentence_models import load_model
from ragcache.text import replace_surrogates

__all__ = ["CrossEncoderReranker", "Reranker"]

logger = logging.getLogger(__name__)


class Reranker(Protocol):
    """A model of relevance, as the retriever uses it."""

    @property
    def name(self) -> str: ...

    def scores(self, question: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """The relevance of each text to the question, (len(texts),): the higher the more relevant.
        Scores of two questions need not be comparable. Deterministic."""
        ...


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers, by the name of a hub or a local folder.

    Pairs that are longer than the model reads are truncated at the end, which is logged once. A
    model's own code is never run, and weights are read from safetensors only. ``device`` is a torch
    device; None chooses the fastest one. Raises ModelError if the model cannot be loaded, or gives
    a pair several scores, as a classifier does.
    """

    def __init__(self, name: str, device: str | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
        from sentence_transformers import CrossEncoder

        self.name = name
        self.batch_size = batch_size
        folder = cross_encoder_folder(name)
        self._model, self.digest = load_model(
            *(CrossEncoder, "cross-encoder", name, folder, device),
            instead="a folder",
        )
        if self._model.num_labels != 1:
            raise ModelError(
                f"the cross-encoder {name} gives each pair {self._model.num_labels} scores: it "
                "tells classes apart. Name one that is trained to rank, with one score."
            )
        self._told = False  # whether truncation was logged

    def scores(self, question: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """See :class:`Reranker`. Raises ModelError if a score is not finite."""
        if not texts:
            return np.empty(0, np.float32)
        asked = replace_surrogates(question)
        pairs = [(asked, replace_surrogates(text)) for text in texts]
        found = self._model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        values: NDArray[np.float32] = np.asarray(found, np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.name} gave a score that is not finite. Load it in float32.")
        self._tell_truncated(pairs)
        return values

    def _tell_truncated(self, pairs: list[tuple[str, str]]) -> None:
        most = self._model.max_seq_length
        if self._told or most is None:
            return
        tokenizer: Any = self._model.tokenizer
        # A token has at least one character, so short pairs need no tokenizer.
        long = [pair for pair in pairs if len(pair[0]) + len(pair[1]) > most - 3]
        ids = tokenizer(long, truncation=False, verbose=False)["input_ids"] if long else []
        if truncated := sum(len(row) > most for row in ids):
            self._told = True
            logger.warning(
                "%d of %d chunks are, with the question, longer than the %d tokens that %s reads: "
                "their ends do not count for their rank. Split into smaller chunks, or choose a "
                "model that reads more. This is said once.",
                *(truncated, len(pairs), most, self.name),
            )
