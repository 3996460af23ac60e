"""Compile modes: what a chunk's KV is computed behind when it is precomputed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.errors import ConfigError
from ragcache.store.key import ChunkKey
from ragcache.types import Fingerprint, Tokens

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.engine.template import PromptTemplate


@dataclass(frozen=True, slots=True)
class EncodingContext:
    """A compile mode for one engine: part of the key of every chunk."""

    mode: str
    behind: Tokens  # computed before the chunk; their rows are dropped
    similar: int = 0  # chunks of the corpus that stand between ``behind`` and the chunk

    def exact(self, prefix: Tokens) -> bool:
        """Whether a chunk's KV is what full prefill gives right behind ``prefix``."""
        return self.behind == prefix and not self.similar

    def key(self, fingerprint: Fingerprint, chunk: Tokens, tenant: str = "") -> ChunkKey:
        return ChunkKey(fingerprint, chunk, self.behind, self.mode, tenant)


#: name -> what it computes a chunk behind. Variants (``incontext``) come from prompts, see
#: :func:`ragcache.core.precompute.store_variants`.
COMPILE_MODES = {
    "prefix": "the prompt's own prefix",
    "bos": "one BOS token, as a chunk has it that a serving engine prefilled by itself",
    "link0": "four BOS tokens: the first tokens of a chunk are no attention sinks (LegoLink-0)",
    "enriched(n)": "the prefix and the n most similar chunks (FusionRAG)",
}


def encoding_context(
    name: str, engine: ChunkEngine, template: PromptTemplate | None = None
) -> EncodingContext:
    """The mode called ``name``, for prompts of ``template``, or else of the engine's own.

    ConfigError if there is no such mode, or the engine has no BOS token.
    """
    prefix = (template or engine.template).prefix
    if name == "prefix":
        return EncodingContext(name, prefix)
    if enriched := re.fullmatch(r"enriched\(([1-9][0-9]?)\)", name):
        return EncodingContext(name, prefix, int(enriched[1]))
    if name not in COMPILE_MODES:
        known = ", ".join(COMPILE_MODES)
        raise ConfigError(f"encoding context {name!r} is unknown: use one of {known}")
    if name == "enriched(n)":
        raise ConfigError(
            "encoding context enriched(n) needs a number of chunks, such as enriched(3)"
        )
    if engine.bos is None:
        raise ConfigError(
            f"encoding context {name} needs a BOS token, which {engine.name} does not have: use "
            "prefix"
        )
    return EncodingContext(name, (engine.bos,) * (4 if name == "link0" else 1))
