"""Who may ask: API keys, which name tenants.

A key is given as ``Authorization: Bearer KEY``, or, for whoever reads with a browser or scrapes,
as the password of ``Authorization: Basic`` (GET only). Only digests of keys are held; the digest of
what is given is compared with all of them, in the same time for any.

Without keys there is one tenant, and whoever reaches the service may ask: so it must be on
loopback, and requests must be addressed to loopback too. A web page that has its own name resolved
to 127.0.0.1 is refused by its Host.
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

from ragcache.api.errors import Problem
from ragcache.errors import ConfigError
from ragcache.settings import ServiceSettings
from ragcache.store.tenants import ROOT_TENANT, TENANT

_SHORTEST = 16  # characters of a key: it may be guessed at over a network
_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]*)?")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
#: For a person who opens an address; a page that fetches is not to make its browser ask.
_TO_A_PERSON = {"WWW-Authenticate": 'Bearer, Basic realm="ragcache"'}


class Keys:
    """Digests of API keys, and the tenant of each. A tenant may have several."""

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        self._tenants = [(_digest(key), tenant) for tenant, key in keys]
        if len({digest for digest, _ in self._tenants}) < len(self._tenants):
            raise ConfigError("one API key is given twice: give every tenant keys of its own")

    @classmethod
    def of(cls, settings: ServiceSettings) -> Self:
        """Keys of the file and of the environment. ConfigError names the line that cannot be
        read."""
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
            given = enumerate(settings.api_keys.get_secret_value().split(","), 1)
            lines += [(line, f"key {number} of RAGCACHE_API_KEYS") for number, line in given]
        kept = [(line.strip(), where) for line, where in lines]
        keys = cls(_pair(line, where) for line, where in kept if line and line[0] != "#")
        if not keys and (settings.keys is not None or settings.api_keys is not None):
            raise ConfigError("API keys are asked for, but none is given: add lines name:key")
        return keys

    @property
    def tenants(self) -> list[str]:
        """Each once, in the order of their first keys; "" is whose store is the service's own."""
        return list(dict.fromkeys(tenant for _, tenant in self._tenants))

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, key: str) -> str | None:
        """The tenant of a key; None where nobody has it. Takes the same time for any key."""
        digest, found = _digest(key), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


class Guarded:
    """Asks for a key on every path that is not ``open``; puts the tenant into ``scope["state"]``.

    ``open``: paths, and folders that end in a slash; the root is a path.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open: tuple[str, ...]) -> None:
        self.app, self.keys, self.open = app, keys, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["state"]["tenant"] = self._tenant(scope)
            except Problem as refused:
                return await refused.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        if not self.keys:
            if not is_loopback(_host(headers.get("host", ""))):
                raise Problem(
                    403,
                    "without API keys only requests to localhost are answered: see --keys",
                    code="forbidden_host",
                )
            return ""
        if self._is_open(scope["path"]):
            return ""
        kind, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip()
        if kind.lower() == "basic" and scope["method"] in ("GET", "HEAD"):
            key = _password(key)
        elif kind.lower() != "bearer":
            key = ""
        tenant = self.keys.tenant(key) if key else None
        if tenant is None:
            said = "the API key is not known" if key else "an API key is needed"
            message = f"{said}: send Authorization: Bearer KEY"
            opens = headers.get("sec-fetch-mode") == "navigate"
            challenge = _TO_A_PERSON if opens else _CHALLENGE
            raise Problem(401, message, code="invalid_api_key", headers=challenge)
        return tenant

    def _is_open(self, path: str) -> bool:
        if path in self.open:
            return True
        return any(one != "/" and one[-1] == "/" and path.startswith(one) for one in self.open)


def check_bind(host: str, keys: Keys) -> None:
    """Raise ConfigError where anybody on the network could ask."""
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines, and no API keys are given: anybody could "
            "read the documents. Give keys (--keys FILE with lines name:key, or "
            "RAGCACHE_API_KEYS), or serve at 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """A Host header without its port; nothing where it is none."""
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
            f"{where} is not name:key, with a name of up to 63 of a-z, 0-9, - and _, or . for "
            "whoever asks the store itself"
        )
    if len(key) < _SHORTEST:
        raise ConfigError(
            f"the key in {where} has {len(key)} characters: give at least {_SHORTEST}, such as "
            "what `openssl rand -hex 32` prints"
        )
    return "" if name == ROOT_TENANT else name, key


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogateescape")).digest()
