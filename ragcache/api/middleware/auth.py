"""Authentication by API keys, each of which belongs to a tenant.

Clients send a key as ``Authorization: Bearer KEY``; browsers and scrapers may send it as the
password of ``Authorization: Basic`` (GET only). The service holds only digests of keys, and
compares a client's with all of them in constant time.

Without keys there is one tenant, and every client that can connect has access. So the service must
listen on loopback, and the Host header must be loopback too: that refuses a web page whose own
name resolves to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Iterable
from hashlib import sha256
from typing import Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ragcache.api.errors import ApiError
from ragcache.errors import ConfigError
from ragcache.settings import ServiceSettings
from ragcache.store.tenants import ROOT_TENANT, TENANT

_MIN_LENGTH = 16  # characters of a key, which clients could guess over a network
_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]*)?")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
#: For a user who opens a URL; to a page's fetch it would make the browser show its own dialog.
_BROWSER_CHALLENGE = {"WWW-Authenticate": 'Bearer, Basic realm="ragcache"'}


class ApiKeys:
    """Digests of API keys, each with its tenant. A tenant may have several keys."""

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        self._tenants = [(_digest(key), tenant) for tenant, key in keys]
        if len({digest for digest, _ in self._tenants}) < len(self._tenants):
            raise ConfigError("the same API key is given twice: give every tenant keys of its own")

    @classmethod
    def of(cls, settings: ServiceSettings) -> Self:
        """The keys of the file and of the environment. Raises ConfigError that names an invalid
        line."""
        lines: list[tuple[str, str]] = []
        if settings.keys is not None:
            try:
                text = settings.keys.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"cannot read the API keys in {settings.keys}: {error}. Name a file of lines "
                    "name:key that this user may read."
                ) from None
            numbered = enumerate(text.splitlines(), 1)
            lines += [(line, f"line {number} of {settings.keys}") for number, line in numbered]
        if settings.api_keys is not None:
            values = enumerate(settings.api_keys.get_secret_value().split(","), 1)
            lines += [(line, f"key {number} of RAGCACHE_API_KEYS") for number, line in values]
        stripped = [(line.strip(), where) for line, where in lines]
        keys = cls(_pair(line, where) for line, where in stripped if line and line[0] != "#")
        if not keys and (settings.keys is not None or settings.api_keys is not None):
            raise ConfigError("API keys are configured, but there are none: add lines name:key")
        return keys

    @property
    def tenants(self) -> list[str]:
        """The tenants in the order of their first keys; "" is the tenant of the default store."""
        return list(dict.fromkeys(tenant for _, tenant in self._tenants))

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, key: str) -> str | None:
        """The tenant of a key; None if the key is unknown. Takes constant time."""
        digest, found = _digest(key), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


class ApiKeyAuth:
    """Requires a key on every path that is not public; puts the tenant into ``scope["state"]``.

    ``public_paths`` are paths, and prefixes that end in a slash; "/" is a path.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, public_paths: tuple[str, ...]) -> None:
        self.app, self.keys, self.public_paths = app, keys, public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["state"]["tenant"] = self._tenant(scope)
            except ApiError as refused:
                return await refused.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        if not self.keys:
            if not _is_loopback(_host(headers.get("host", ""))):
                raise ApiError(
                    403,
                    "without API keys only requests to localhost are answered: give --keys",
                    code="forbidden_host",
                )
            return ""
        if self._is_public(scope["path"]):
            return ""
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        key = credentials.strip()
        if scheme.lower() == "basic" and scope["method"] in ("GET", "HEAD"):
            key = _password(key)
        elif scheme.lower() != "bearer":
            key = ""
        tenant = self.keys.tenant(key) if key else None
        if tenant is None:
            reason = "the API key is unknown" if key else "an API key is needed"
            message = f"{reason}: send Authorization: Bearer KEY"
            by_browser = headers.get("sec-fetch-mode") == "navigate"
            challenge = _BROWSER_CHALLENGE if by_browser else _CHALLENGE
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        return tenant

    def _is_public(self, path: str) -> bool:
        if path in self.public_paths:
            return True
        return any(
            one != "/" and one[-1] == "/" and path.startswith(one) for one in self.public_paths
        )


def check_bind(host: str, keys: ApiKeys) -> None:
    """Raise ConfigError if other machines could connect and there are no keys."""
    if not keys and not _is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and there are no API keys: anybody could "
            "read the documents. Give keys (--keys FILE with lines name:key, or "
            "RAGCACHE_API_KEYS), or serve at 127.0.0.1."
        )


def _is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """A Host header without its port; empty if it is invalid."""
    found = _HOST.fullmatch(header)
    return (found["address"] or found["name"]).lower() if found else ""


def _password(basic: str) -> str:
    try:
        return base64.b64decode(basic, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _pair(line: str, where: str) -> tuple[str, str]:
    name, colon, key = (part.strip() for part in line.partition(":"))
    if not colon or name != ROOT_TENANT and TENANT.fullmatch(name) is None:
        raise ConfigError(
            f"{where} is not name:key, where name is up to 63 of a-z, 0-9, - and _, or . for the "
            "store itself"
        )
    if len(key) < _MIN_LENGTH:
        raise ConfigError(
            f"the key in {where} has {len(key)} characters: give at least {_MIN_LENGTH}, such as "
            "the output of `openssl rand -hex 32`"
        )
    return "" if name == ROOT_TENANT else name, key


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogateescape")).digest()
