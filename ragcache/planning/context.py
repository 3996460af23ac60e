"""Compile modes: what a chunk's KV is computed behind when it is precomputed."""

from __future__ import annotations

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
    context: Tokens  # computed before the chunk; their rows are dropped

    def exact(self, prefix: Tokens) -> bool:
        """Whether a chunk's KV is what full prefill gives right behind ``prefix``."""
        return self.context == prefix

    def key(self, fingerprint: Fingerprint, chunk: Tokens, tenant: str = "") -> ChunkKey:
        return ChunkKey(fingerprint, chunk, self.context, self.mode, tenant)


#: name -> what it computes a chunk behind. Variants (``incontext``) come from prompts, see
#: :func:`ragcache.core.precompute.keep_variants`.
COMPILE_MODES = {
    "prefix": "the prompt's own prefix",
    "bos": "one BOS token, as a chunk has it that a serving engine prefilled by itself",
    "link0": "four BOS tokens: the first tokens of a chunk are no attention sinks (LegoLink-0)",
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
    if name.startswith("enriched"):
        raise ConfigError(
            f"compile mode {name} no longer exists, because fused, the default mode, gave worse "
            "answers with it. Index the documents into a new store; or use this one with "
            "--compile prefix (RAGCACHE_COMPILE=prefix), which computes its chunks again"
        )
    if name not in COMPILE_MODES:
        known = ", ".join(COMPILE_MODES)
        raise ConfigError(f"compile mode {name!r} is unknown: use one of {known}")
    if engine.bos is None:
        raise ConfigError(
            f"compile mode {name} needs a BOS token, which {engine.name} does not have: use prefix"
        )
    return EncodingContext(name, (engine.bos,) * (4 if name == "link0" else 1))
