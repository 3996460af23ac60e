"""The KV shape of each model that a store was opened with.

The shape in a header may be wrong: the header may come from another machine. With an open model,
the model's shape is compared (:meth:`Header.foreign`); without one, as in ``verify`` and ``pull``,
the one recorded here.
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

__all__ = ["record_shape", "unrecorded"]

_TABLE, _NAME = "settings", "shape:"


def unrecorded(txn: Transaction, fingerprints: Iterable[Fingerprint]) -> list[Fingerprint]:
    """The fingerprints with a known shape that is not recorded, or recorded differently."""
    return [
        each
        for each in fingerprints
        if each.spec is not None and txn.get(_TABLE, _key(each.digest)) != _value(each)
    ]


def record_shape(txn: Transaction, fingerprint: Fingerprint) -> None:
    """Record the shape of a model whose shape is known."""
    txn.put(_TABLE, _key(fingerprint.digest), _value(fingerprint))


def check_shape(txn: Transaction, header: Header) -> Miss | None:
    """A miss where the header's KV has another shape or codec than the recorded ones of its model;
    None where they match, or none are recorded."""
    if (recorded := recorded_shape(txn, header.fingerprint)) is None:
        return None
    spec, codec = recorded
    if header.codec != codec:
        return Miss("foreign", f"its codec is {header.codec}, the model's is {codec}")
    return shape_mismatch(header.spec, spec)


def recorded_shape(txn: Transaction, digest: bytes) -> tuple[KVSpec, str] | None:
    """The recorded shape and codec of the model with this fingerprint digest; None if there are
    none."""
    try:
        *spec, codec = json.loads(txn.get(_TABLE, _key(digest)) or b"null")
        return KVSpec(*spec), str(codec)
    except (TypeError, ValueError):  # not there, or not written by us
        return None


def _key(digest: bytes) -> bytes:
    return (_NAME + digest.hex()).encode()


def _value(fingerprint: Fingerprint) -> bytes:
    assert fingerprint.spec is not None
    return json.dumps([*astuple(fingerprint.spec), fingerprint.codec]).encode()
