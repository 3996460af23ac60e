"""Encoding contexts: the tokens after which a chunk's KV is computed when it is precomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.errors import ConfigError
from ragcache.store.key import ChunkKey
from ragcache.types import Fingerprint, Tokens

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.engine.template import PromptTemplate

__all__ = ["EncodingContext", "encoding_context"]


@dataclass(frozen=True, slots=True)
class EncodingContext:
    """The context in which one engine precomputes chunks. It is part of the key of every chunk."""

    mode: str  # its name
    context: Tokens  # they precede the chunk in the forward pass; their KV is dropped

    def exact(self, prefix: Tokens) -> bool:
        """Whether a chunk's KV equals full prefill's if the chunk directly follows ``prefix``."""
        return self.context == prefix

    def key(self, fingerprint: Fingerprint, chunk: Tokens, tenant: str = "") -> ChunkKey:
        return ChunkKey(fingerprint, chunk, self.context, self.mode, tenant)


#: Names and descriptions. Variants (``incontext``) are taken from prompts instead, see
#: :func:`ragcache.core.precompute.store_variants`.
_ENCODING_CONTEXTS = {
    "prefix": "the prompt's own prefix",
    "bos": "one BOS token, as when a serving engine prefills the chunk alone",
    "link0": "four BOS tokens, so that a chunk's first tokens are no attention sinks (LegoLink-0)",
}


def encoding_context(
    name: str, engine: ChunkEngine, template: PromptTemplate | None = None
) -> EncodingContext:
    """The encoding context ``name`` for prompts of ``template`` (default: the engine's own).

    Raises ConfigError for an unknown name, and for a context that needs a BOS token if the engine
    has none.
    """
    prefix = (template or engine.template).prefix
    if name == "prefix":
        return EncodingContext(name, prefix)
    if name.startswith("enriched"):
        raise ConfigError(
            f"encoding context {name} no longer exists: fused, the default mode, gave worse "
            "answers with it. Index the documents into a new store; or use this one with "
            "--encoding-context prefix, which computes its chunks again"
        )
    if name not in _ENCODING_CONTEXTS:
        known = ", ".join(_ENCODING_CONTEXTS)
        raise ConfigError(f"encoding context {name!r} is unknown: use one of {known}")
    if engine.bos is None:
        raise ConfigError(
            f"encoding context {name} needs a BOS token, which {engine.name} does not have: use "
            "prefix"
        )
    return EncodingContext(name, (engine.bos,) * (4 if name == "link0" else 1))
