"""Keys of chunks: everything that a chunk's KV depends on, as one digest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from blake3 import blake3

from ragcache.types import Fingerprint, Tokens

__all__ = ["ChunkKey", "digest_tokens", "variant_key", "with_codec"]

DIGEST = 32  # bytes of every digest


def digest_tokens(tokens: Tokens) -> bytes:
    """blake3 over the ids as little-endian u32, 32 bytes."""
    return blake3(np.asarray(tokens, dtype="<u4").tobytes()).digest()


def digest_content(tenant: str, tokens: Tokens) -> bytes:
    """blake3 over the length and name of a tenant and the digest of the ids, 32 bytes."""
    name = tenant.encode()
    return blake3(len(name).to_bytes(4, "little") + name + digest_tokens(tokens)).digest()


IN_CONTEXT = "incontext"  # the encoding context of variants, see ``variant_key``


@dataclass(frozen=True)
class ChunkKey:
    """Identity of one chunk's KV.

    ``mode`` is the name of the encoding context (``prefix``: computed after the prompt's prefix).
    """

    fingerprint: Fingerprint
    tokens: Tokens  # the chunk's own ids
    context: Tokens = ()  # ids that preceded the chunk when it was computed
    mode: str = "prefix"
    tenant: str = ""

    @property
    def codec(self) -> str:
        """How the KV is stored; part of the fingerprint."""
        return self.fingerprint.codec

    @cached_property
    def content(self) -> bytes:
        """Digest of what does not depend on the model: tenant and the chunk's own tokens.

        Lets a store tell *stale* (these tokens, another model or prefix) from *absent*.
        """
        return digest_content(self.tenant, self.tokens)

    @cached_property
    def digest(self) -> bytes:
        """blake3(fingerprint | mode | context | content), each part of fixed or stated length."""
        mode = self.mode.encode()
        return blake3(
            self.fingerprint.digest
            + len(mode).to_bytes(4, "little")
            + mode
            + digest_tokens(self.context)
            + self.content
        ).digest()


def with_codec(key: ChunkKey, codec: str) -> ChunkKey:
    """The key of the same KV stored with another codec."""
    return replace(key, fingerprint=key.fingerprint.with_codec(codec))


def variant_key(
    fingerprint: Fingerprint, tokens: Tokens, before: Tokens, tenant: str = ""
) -> ChunkKey:
    """The key of the KV of ``tokens`` as captured in a prompt after the tokens ``before``.

    The mode contains a digest of ``before``, so that the key can be made from the stored record,
    which does not contain these ids.
    """
    mode = f"{IN_CONTEXT}:{digest_tokens(before).hex()[:32]}"
    return ChunkKey(fingerprint, tokens, (), mode, tenant)
