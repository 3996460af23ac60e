"""Where the stores of tenants are: below the folder of all, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

from ragcache.errors import ConfigError

TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
TENANTS = "tenants"  # the folder, in that of the service's own store


def tenant_folder(root: Path, tenant: str) -> Path:
    """The folder of a tenant's store: ``root`` itself for the tenant called "". ConfigError for a
    name that is not valid."""
    if not tenant:
        return root
    if TENANT.fullmatch(tenant) is None:
        raise ConfigError(f"{tenant!r} cannot be a tenant: give up to 63 of a-z, 0-9, - and _")
    return root / TENANTS / tenant
