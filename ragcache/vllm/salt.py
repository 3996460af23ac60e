"""Isolate requests in vLLM's prefix cache.

vLLM looks cached blocks up by their tokens. Fused KV differs from the KV that a plain prefill of
the same tokens gives, so without isolation other prompts with the same beginning would use it. A
``cache_salt`` becomes part of the hash of all blocks of a request. A digest of the whole manifest
as the salt lets requests share blocks only if they would compute the same KV.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from blake3 import blake3

from ragcache.errors import PromptError
from ragcache.vllm.manifest import Manifest


def cache_salt(manifest: Manifest) -> str:
    """The ``cache_salt`` of a request with this manifest.

    It depends on the model, the tenant, the mode with its parameters, the encoding context, the
    sizes of the parts, which of them are chunks, the stored chunks, and every token: some methods
    choose rows by the question, so that even the chunks' KV depends on it. It depends on the
    ``ticket`` only for ``keep``, whose KV must be computed and not cached.
    """
    recipe = asdict(manifest)
    if manifest.task == "fuse":
        del recipe["ticket"]
    return f"ragcache-{blake3(json.dumps(recipe, sort_keys=True).encode()).hexdigest()}"


def tenant_salt(tenant: str) -> str | None:
    """The ``cache_salt`` of a tenant's requests without a manifest.

    It prevents timing attacks on the prompts of other tenants. None for the tenant without a name,
    which shares blocks with all plain requests.
    """
    if not tenant:
        return None
    return f"ragcache-tenant-{blake3(tenant.encode()).hexdigest()}"


def check_salt(manifest: Manifest, given: str | None) -> None:
    """Raise PromptError unless ``given`` is the salt of the manifest."""
    if given != cache_salt(manifest):
        raise PromptError(
            "fused KV under "
            + ("no cache_salt" if given is None else "another cache_salt")
            + " would be found by prompts that it is wrong for: send the manifest's own "
            "(ragcache.vllm.salt.cache_salt)"
        )
