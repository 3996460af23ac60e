"""Encoding contexts: the tokens after which a chunk's KV is computed when it is precomputed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from ragcache.errors import ConfigError
from ragcache.planning.prose import PROSE
from ragcache.store.key import ChunkKey
from ragcache.types import Fingerprint, Tokens

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.engine.template import PromptTemplate

__all__ = ["CONTEXT_REVISIONS", "DEFAULT_CONTEXT", "EncodingContext", "encoding_context"]

DEFAULT_CONTEXT = "prose"  # of new stores

PROSE_TOKENS = 600

#: Raised when the text of a context changes; 1 where it is not given.
CONTEXT_REVISIONS = {"prose": 2}


@dataclass(frozen=True, slots=True)
class EncodingContext:
    """The context in which one engine precomputes chunks. It is part of the key of every chunk."""

    mode: str  # its name
    context: Tokens  # they precede the chunk in the forward pass; their KV is dropped
    most: int | None = None  # tokens of context and chunk that the engine's own context has

    @property
    def digest(self) -> str:
        """Of its tokens, in hex."""
        return blake3(array("q", self.context).tobytes()).hexdigest()

    def before(self, chunk: Tokens) -> Tokens:
        """What a chunk is computed after: the context, or where it does not fit, its first token,
        which is an attention sink, and as much of its end as fits."""
        room = len(self.context) if self.most is None else max(1, self.most - len(chunk))
        cut = max(0, len(self.context) - room)
        return self.context[:1] + self.context[1 + cut :]

    def key(self, fingerprint: Fingerprint, chunk: Tokens, tenant: str = "") -> ChunkKey:
        return ChunkKey(fingerprint, chunk, self.before(chunk), self.mode, tenant)


#: Names and descriptions. Variants (``incontext``) are taken from prompts instead, see
#: :func:`ragcache.core.precompute.store_variants`.
_ENCODING_CONTEXTS = {
    "prose": f"the prompt's own prefix and up to {PROSE_TOKENS} tokens of text about other things",
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
    prefix, most = (template or engine.template).prefix, engine.context_tokens
    if name == "prefix":
        return EncodingContext(name, prefix, most)
    if name == "prose":
        # No document is part of it: KV of one chunk has nothing of another.
        prose = whole_texts(engine, PROSE, min(PROSE_TOKENS, most // 4))
        return EncodingContext(name, prefix + prose, most)
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
    return EncodingContext(name, (engine.bos,) * (4 if name == "link0" else 1), most)


def whole_texts(engine: ChunkEngine, texts: Sequence[str], most: int) -> Tokens:
    """The first of ``texts`` that have at most ``most`` tokens together.

    They are whole, and tokenised as the chunks of a prompt: after a sentence without an end, the
    first tokens of a chunk would continue it.
    """
    found: Tokens = ()
    for text in texts:
        tokens = engine.template.chunk(text)
        if len(found) + len(tokens) > most:
            break
        found += tokens
    return found
