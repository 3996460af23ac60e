"""Where the stores of tenants are: below the folder of all, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

from ragcache.errors import ConfigError

TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
ROOT_TENANT = "."  # in a file of keys: whose is the store itself, and no tenant's below it
_TENANTS = "tenants"  # the folder, in that of the service's own store


def tenant_folder(root: Path, tenant: str) -> Path:
    """The folder of a tenant's store: ``root`` itself for the tenant called "". ConfigError for a
    name that is not valid."""
    if not tenant:
        return root
    if TENANT.fullmatch(tenant) is None:
        raise ConfigError(f"{tenant!r} cannot be a tenant: give up to 63 of a-z, 0-9, - and _")
    return root / _TENANTS / tenant


def make_tenant_folder(root: Path, tenant: str) -> Path:
    """The same, with the folder that it is in."""
    path = tenant_folder(root, tenant)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return path
