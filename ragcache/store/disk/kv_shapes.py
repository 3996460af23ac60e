"""The shape of the KV that each model makes, as the models said with which a store was opened.

A header says itself what shape its KV has, and may be wrong about it: it comes from another
machine, or somebody has put it there. Where a model is open, its own shape is compared
(:meth:`Header.foreign`). Without one, as in ``verify`` and ``pull``, what is noted here is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from typing import TYPE_CHECKING

from ragcache.store.base import Miss
from ragcache.store.format.header import Header, shape_mismatch
from ragcache.types import Fingerprint, KVSpec

if TYPE_CHECKING:
    from ragcache.store.lmdb.tables import Transaction

_TABLE, _NAME = "settings", "shape:"


def unrecorded(txn: Transaction, fingerprints: Iterable[Fingerprint]) -> list[Fingerprint]:
    """Those whose shape is known, and not noted, or noted as another."""
    return [
        each
        for each in fingerprints
        if each.spec is not None and txn.get(_TABLE, _key(each.digest)) != _value(each)
    ]


def record_shape(txn: Transaction, fingerprint: Fingerprint) -> None:
    """Note the shape of a model whose shape is known."""
    txn.put(_TABLE, _key(fingerprint.digest), _value(fingerprint))


def check_shape(txn: Transaction, header: Header) -> Miss | None:
    """Why this cannot be KV of the model that the header names, if that is known."""
    if (noted := recorded_shape(txn, header.fingerprint)) is None:
        return None
    spec, codec = noted
    if header.codec != codec:
        return Miss("foreign", f"its codec is {header.codec}, the model's is {codec}")
    return shape_mismatch(header.spec, spec)


def recorded_shape(txn: Transaction, digest: bytes) -> tuple[KVSpec, str] | None:
    """Shape and codec of the model whose fingerprint has this digest; None where none is noted."""
    try:
        *spec, codec = json.loads(txn.get(_TABLE, _key(digest)) or b"null")
        return KVSpec(*spec), str(codec)
    except (TypeError, ValueError):  # nothing, or something that we have not written
        return None


def _key(digest: bytes) -> bytes:
    return (_NAME + digest.hex()).encode()


def _value(fingerprint: Fingerprint) -> bytes:
    assert fingerprint.spec is not None
    return json.dumps([*astuple(fingerprint.spec), fingerprint.codec]).encode()
