"""The store on local disk: one LMDB record per chunk and layer, read in parallel.

For layers below about 1 MiB; LMDB reads larger ones slower than plain files do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.errors import StoreError
from ragcache.store import variants
from ragcache.store.base import (
    ChunkStore,
    Miss,
    Stored,
    StoreStats,
    Tally,
    Variant,
    check_layer,
    stale,
    unusable,
)
from ragcache.store.codec import (
    Header,
    check_kv,
    decode_header,
    decode_layer,
    encode_header,
    encode_layers,
)
from ragcache.store.environment import Environment
from ragcache.store.index import account, reindex, remove, totals
from ragcache.types import ChunkKV, ChunkNotes

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.store.key import ChunkKey
    from ragcache.store.tables import Transaction

_AFTER_LAYERS = b"\xff\xff\xff"  # sorts after every u16 layer of a digest
_DIGEST = 32
_PAGE = 1000  # digests listed per read transaction


class LmdbStore(ChunkStore):
    """Chunks in the directory ``path``, made where it is missing (0700, files 0600).

    ``map_size``: bytes that the store can ever grow to; it reserves addresses, not space, so
    leave it huge. ``max_bytes``: payload beyond which ``put`` raises StoreError; None for no
    bound. ``readonly``: for all processes but the one that writes. Raises StoreError where the
    directory cannot be opened. Not usable in a forked child: open it there anew, after spawn.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        map_size: int = 1 << 40,
        readonly: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        self.tables = Environment(path, map_size=map_size, readonly=readonly)
        self.max_bytes = max_bytes
        self._tally = Tally()

    def put(self, key: ChunkKey, kv: ChunkKV, notes: ChunkNotes | None = None) -> None:
        check_kv(key, kv, notes)
        with self.tables.write() as txn:
            remove(txn, key.digest)
            payloads = []
            for layer, (raw, checksum) in enumerate(encode_layers(key, kv)):
                txn.put("layers", _layer_key(key.digest, layer), raw)
                payloads.append((len(raw), checksum))
            header = Header.of(key, kv, payloads)
            txn.put("headers", key.digest, encode_header(header))
            account(txn, header, 1)
            if notes is not None:
                variants.put(txn, key.digest, notes)
            total = sum(payload for _, payload, _ in totals(txn))
            if self.max_bytes is not None and total > self.max_bytes:
                raise StoreError(
                    f"the store in {self.tables.path} may hold {self.max_bytes} bytes of KV and "
                    f"would hold {total} with this chunk: delete chunks or raise max_bytes"
                )

    def find(self, key: ChunkKey) -> Stored | Miss:
        with self.tables.read() as txn:
            header = _find(txn, key)
        if isinstance(header, Miss):
            return self._tally.count(header)
        return self._tally.count(header.stored(key))

    def has(self, key: ChunkKey) -> bool:
        with self.tables.read() as txn:
            return isinstance(_find(txn, key), Header)

    def layer(self, key: ChunkKey, layer: int) -> tuple[Tensor, Tensor]:
        with self.tables.read() as txn:
            header = _find(txn, key)
            found = header if isinstance(header, Miss) else _layer(txn, header, layer)
        if isinstance(found, Miss):
            raise unusable(key, layer, self._tally.count(found))
        return found

    def get(self, key: ChunkKey) -> ChunkKV | Miss:
        """The whole chunk, every layer verified, all layers of one ``put``."""
        with self.tables.read() as txn:
            header = _find(txn, key)
            found = header if isinstance(header, Miss) else _chunk(txn, header)
        return self._tally.count(found)

    def variants(self, key: ChunkKey) -> list[Variant]:
        with self.tables.read() as txn:
            return variants.find(txn, key)

    def credit(self, worth: Mapping[ChunkKey, float]) -> None:
        with self.tables.write() as txn:
            for key, more in worth.items():
                variants.credit(txn, key, more)

    def delete(self, key: ChunkKey) -> bool:
        with self.tables.write() as txn:
            return remove(txn, key.digest)

    def keys(self) -> Iterator[bytes]:
        start = b""
        while True:
            with self.tables.read() as txn:
                page = list(islice(txn.keys("headers", start=start), _PAGE))
            yield from page
            if len(page) < _PAGE:
                return
            start = page[-1] + b"\0"

    def stats(self) -> StoreStats:
        with self.tables.read() as txn:
            chunks = txn.count("headers")
            sums = list(totals(txn))
        fingerprints: Counter[str] = Counter()
        for count, _, name in sums:
            fingerprints[name] += count
        payload_bytes = sum(payload for _, payload, _ in sums)
        return StoreStats(chunks, payload_bytes, *self._tally.snapshot(), dict(fingerprints))

    def verify(self, *, repair: bool = False) -> dict[str, str]:
        """Read every record; hex digest -> what is wrong. ``repair`` drops the bad ones.

        Also finds layers that belong to no chunk. Does not count as hits or misses.
        """
        bad: dict[bytes, str] = {}
        for digest in (*self.keys(), *self._orphans()):
            with self.tables.read() as txn:
                miss = _damage(txn, digest)
            if miss is not None:
                bad[digest] = f"{miss.reason}: {miss.detail}"
        if repair and bad:
            with self.tables.write() as txn:
                for digest in bad:
                    remove(txn, digest)
                reindex(txn)
        return {digest.hex(): wrong for digest, wrong in bad.items()}

    def close(self) -> None:
        self.tables.close()

    def _orphans(self) -> Iterator[bytes]:
        """What layer records are stored under, where there is no header for it."""
        start = b""
        while True:
            with self.tables.read() as txn:
                key = next(txn.keys("layers", start=start), None)
                if key is None:
                    return
                digest = key[:_DIGEST]
                orphan = txn.view("headers", digest) is None
            if orphan:
                yield digest
            start = digest + _AFTER_LAYERS


def _layer_key(digest: bytes, layer: int) -> bytes:
    return digest + layer.to_bytes(2, "big")


def _find(txn: Transaction, key: ChunkKey) -> Header | Miss:
    record = txn.get("headers", key.digest)
    if record is None:
        return _absent(txn, key)
    header = decode_header(record)
    if isinstance(header, Miss):
        return header
    return header.foreign(key) or header


def _absent(txn: Transaction, key: ChunkKey) -> Miss:
    for row in txn.keys("contents", key.content):
        other = decode_header(txn.get("headers", row[_DIGEST:]) or b"")
        if isinstance(other, Header):
            return stale(key, other.name, other.mode)
    return Miss("absent", "these tokens are not stored")


def _layer(txn: Transaction, header: Header, layer: int) -> tuple[Tensor, Tensor] | Miss:
    check_layer(layer, header.spec.layers)
    record = txn.view("layers", _layer_key(header.key, layer))
    if record is None:
        return Miss("truncated", f"layer {layer} of {header.spec.layers} is missing")
    return decode_layer(header, layer, record)


def _chunk(txn: Transaction, header: Header) -> ChunkKV | Miss:
    pairs = []
    for layer in range(header.spec.layers):
        pair = _layer(txn, header, layer)
        if isinstance(pair, Miss):
            return pair
        pairs.append(pair)
    keys, values = zip(*pairs, strict=True)
    return ChunkKV(header.tokens, keys, values, header.sensitivity)


def _damage(txn: Transaction, digest: bytes) -> Miss | None:
    """What is wrong with the records under ``digest``; None too where they are gone by now."""
    record = txn.get("headers", digest)
    layers = sum(1 for _ in txn.keys("layers", digest))
    if record is None:
        return Miss("truncated", f"{layers} layers without a header") if layers else None
    header = decode_header(record)
    if isinstance(header, Miss):
        return header
    if header.key != digest:
        return Miss("foreign", f"the header names {header.key.hex()[:12]}")
    chunk = _chunk(txn, header)
    if isinstance(chunk, Miss):
        return chunk
    if layers != header.spec.layers:
        return Miss("corrupt", f"{layers} layers stored, {header.spec.layers} expected")
    return None
