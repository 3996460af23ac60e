"""Encode the chunks of a store in another codec, without computing them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ragcache.errors import StoreError
from ragcache.store.base import Miss
from ragcache.store.format.codecs import find_codec
from ragcache.store.format.record import TranscodeTarget
from ragcache.store.key import ChunkKey, with_codec

if TYPE_CHECKING:
    from ragcache.store.disk.store import DiskStore
    from ragcache.store.format.header import Header
    from ragcache.types import Fingerprint, Progress, Tokens

__all__ = ["Recoded", "recode"]

_Left = Literal["there", "lossy", "unknown"]


@dataclass(frozen=True, slots=True)
class Recoded:
    """The numbers of a store's chunks by what became of them."""

    recoded: int = 0
    there: int = 0  # had the codec already
    lossy: int = 0  # left: their own codec has lost some of their precision
    unknown: int = 0  # left: of another model or encoding context
    damaged: int = 0  # left
    bytes_before: int = 0  # of the layers of those that were recoded
    bytes_after: int = 0


def recode(
    disk: DiskStore,
    fingerprint: Fingerprint,
    before: Callable[[Tokens], Tokens],
    progress: Progress | None = None,
) -> Recoded:
    """Replace the stored chunks of a model by the same in the codec of ``fingerprint``.

    ``before``: the tokens after which a chunk with the given tokens was computed.

    A chunk is replaced in one commit: after a kill, a second call recodes the rest. Chunks in a
    codec that loses more than the precision of 16-bit weights are left as they are, since under
    their new key they would be taken for what the model has computed. So are chunks of other
    models, and texts that were computed after other texts: their key does not follow from what is
    stored. ``progress`` is called with (done, total). Raises StoreError where nothing can be
    recoded though there is something, and where a quota would evict.
    """
    counts = Counter[str]()
    wanted: list[tuple[bytes, TranscodeTarget]] = []
    for header in _headers(disk):
        target = _target(header, fingerprint, before)
        if isinstance(target, TranscodeTarget):
            wanted.append((header.key, target))
        else:
            counts[target] += 1
    if counts["lossy"] and not wanted and not counts["there"]:
        raise StoreError(
            f"no chunk can be encoded in codec {fingerprint.codec}: {counts['lossy']} are in one "
            "that has lost some of their precision. Nothing is changed; `ragcache index --codec` "
            "with the documents computes them anew"
        )
    evicted = disk.evictions
    for done, (digest, target) in enumerate(wanted, 1):
        sizes = disk.recode(digest, target)
        if disk.evictions > evicted:
            raise StoreError(
                f"the chunks do not fit into the quota in codec {fingerprint.codec}: the first was "
                "evicted. Raise max_bytes, and run the same command again"
            )
        if sizes is None:
            counts["there"] += 1
        elif isinstance(sizes, Miss):
            counts["damaged"] += 1
        else:
            counts.update(recoded=1, bytes_before=sizes[0], bytes_after=sizes[1])
        if progress is not None:
            progress(done, len(wanted))
    return Recoded(**counts)


def _headers(disk: DiskStore) -> Iterator[Header]:
    after = b""
    while page := disk.headers(after=after):
        yield from page
        after = page[-1].key


def _target(
    header: Header, fingerprint: Fingerprint, before: Callable[[Tokens], Tokens]
) -> TranscodeTarget | _Left:
    """What the header of a chunk says in the other codec, or why the chunk is left."""
    if header.codec == fingerprint.codec:
        return "there" if header.fingerprint == fingerprint.digest else "unknown"
    own = fingerprint.with_codec(header.codec)
    for context in (before(header.tokens), ()):
        key = ChunkKey(own, header.tokens, context, header.mode, header.tenant)
        if key.digest != header.key:
            continue
        coded = find_codec(header.codec)
        if isinstance(coded, str):  # its basis is missing
            return "unknown"
        if not coded.faithful:
            return "lossy"
        return TranscodeTarget.of(with_codec(key, fingerprint.codec))
    return "unknown"
