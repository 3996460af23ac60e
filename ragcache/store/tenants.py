"""The directories of tenants' stores, below that of the service's own store."""

from __future__ import annotations

import re
from pathlib import Path

from ragcache.errors import ConfigError

__all__ = ["ROOT_TENANT", "TENANT", "make_tenant_folder", "tenant_folder"]

TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
ROOT_TENANT = "."  # in a file of keys: the owner of the service's own store
_TENANTS = "tenants"  # directory below the service's own store


def tenant_folder(root: Path, tenant: str) -> Path:
    """The directory of a tenant's store; ``root`` itself for the tenant "". Raises ConfigError for
    an invalid name."""
    if not tenant:
        return root
    if TENANT.fullmatch(tenant) is None:
        raise ConfigError(f"{tenant!r} cannot be a tenant: give up to 63 of a-z, 0-9, - and _")
    return root / _TENANTS / tenant


def make_tenant_folder(root: Path, tenant: str) -> Path:
    """As :func:`tenant_folder`; makes its parent directory."""
    path = tenant_folder(root, tenant)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return path
