"""Whose prefix cache a request may share.

vLLM finds cached blocks by the tokens that they stand for. Fused KV is not what those tokens give
by themselves, so under a plain name it would answer everybody's prompts that begin the same. A
``cache_salt`` renames all blocks of a request; one that names its whole recipe lets it share blocks
with requests that would compute the same, and with nobody else.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from blake3 import blake3

from ragcache.errors import PromptError
from ragcache.vllm.manifest import Manifest


def cache_salt(manifest: Manifest) -> str:
    """The ``cache_salt`` of a request with this manifest.

    It depends on model, tenant, mode with its parameters, where parts begin, and every token: some
    methods choose rows by the question, so even the chunks' KV differs from one to the next. Of the
    ``ticket`` it depends only where KV is handed back, which must be computed and not found.
    """
    recipe = asdict(manifest)
    if manifest.task == "fuse":
        del recipe["ticket"]
    return f"ragcache-{blake3(json.dumps(recipe, sort_keys=True).encode()).hexdigest()}"


def tenant_salt(tenant: str) -> str | None:
    """The ``cache_salt`` of a tenant's plain requests: nobody can time whether it has asked what
    another has. None for the tenant of no name, who shares with all plain requests."""
    if not tenant:
        return None
    return f"ragcache-tenant-{blake3(tenant.encode()).hexdigest()}"


def check_salt(manifest: Manifest, given: str | None) -> None:
    """Raise PromptError unless the request carries the salt that its manifest asks for."""
    if given != cache_salt(manifest):
        raise PromptError(
            "fused KV under "
            + ("no cache_salt" if given is None else "another cache_salt")
            + " would be found by prompts that it is wrong for: send the manifest's own "
            "(ragcache.vllm.salt.cache_salt)"
        )
