"""Prompts of random chunks, drawn from a corpus by Zipf's law or split differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ragcache.types import Prompt, Tokens

QUESTION = 32  # tokens
VOCABULARY = 2048  # of the random models; the first few ids are control tokens


def ids(rng: np.random.Generator, count: int) -> Tokens:
    return tuple(rng.integers(3, VOCABULARY, count).tolist())


@dataclass(frozen=True)
class Corpus:
    """Chunks, the n-th 1 / n as popular as the first (Zipf's law)."""

    rng: np.random.Generator
    prefix: Tokens
    texts: Sequence[Tokens]

    def prompt(self, chunks: int) -> Prompt:
        """Another question, over different chunks in random order."""
        weights = 1 / np.arange(1, len(self.texts) + 1)
        chosen = self.rng.choice(len(self.texts), chunks, replace=False, p=weights / weights.sum())
        order = self.rng.permutation(chosen)
        return Prompt.of(
            self.prefix, tuple(self.texts[at] for at in order), ids(self.rng, QUESTION)
        )


def cut(given: Prompt, chunks: int) -> Prompt:
    """The same tokens in ``count`` chunks of similar size."""
    ids = sum(given.chunks, ())
    ends = [len(ids) * number // chunks for number in range(chunks + 1)]
    pieces = tuple(ids[a:b] for a, b in zip(ends, ends[1:], strict=False))
    return Prompt.of(given.prefix, pieces, given.question)
