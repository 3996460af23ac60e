"""The size of a chunk's KV and the FLOPs to compute it, from a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ragcache.types import KVSpec

__all__ = ["ModelShape"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's size and cost. The defaults are those of the packaged small model."""

    spec: KVSpec
    parameters: int = 3_070_000
    heads: int = 4  # query heads

    def size(self, tokens: int) -> int:
        """Bytes of the KV of a chunk of ``tokens`` tokens."""
        return self.spec.chunk_bytes(tokens)

    def flops(self, tokens: int, context_tokens: int = 0) -> float:
        """FLOPs to compute a chunk's KV: 2 * parameters * n + 4 * layers * heads * head_dim *
        pairs.

        A multiplication and an addition per parameter and token (Kaplan et al., arXiv:2001.08361),
        and the same, for keys and for values, per attention weight and dimension: n^2 / 2 pairs
        within the chunk, since the causal mask hides half, and n * ``context_tokens`` with the
        tokens that precede it. Parameters of the embedding and the output layer count too.
        """
        width, pairs = self.heads * self.spec.head_dim, tokens**2 / 2 + tokens * context_tokens
        return 2.0 * self.parameters * tokens + 4.0 * self.spec.layers * width * pairs
