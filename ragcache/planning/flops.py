"""How large a chunk's KV is, and what computing it costs, from a model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from ragcache.types import KVSpec


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model, as far as sizes and costs go. The defaults go with the small model's ``KVSpec``."""

    spec: KVSpec
    parameters: int = 3_070_000
    heads: int = 4  # of queries

    def size(self, tokens: int) -> int:
        """Bytes of a chunk's KV."""
        return self.spec.chunk_bytes(tokens)

    def flops(self, tokens: int, behind: int = 0) -> float:
        """FLOPs to make a chunk's KV: 2 * parameters * n + 4 * layers * heads * head_dim * pairs.

        A multiplication and an addition per weight and token (Kaplan et al., arXiv:2001.08361),
        and the same, for keys and for values, per attention weight and dimension: n^2 / 2 pairs
        within the chunk, for half of the weights are masked, and n * ``behind`` with what stands
        before it. The embedding and the output layer are not told apart.
        """
        width, pairs = self.heads * self.spec.head_dim, tokens**2 / 2 + tokens * behind
        return 2.0 * self.parameters * tokens + 4.0 * self.spec.layers * width * pairs
