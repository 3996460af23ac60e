"""Finds the texts of known chunks in longer texts.

A known text is looked up by hashes of its beginnings (Karp and Rabin's rolling hash, so that the
hash of any piece of the searched text takes constant time). As in the binary search on prefix
lengths of Waldvogel et al. (SIGCOMM 1997), a text of n characters is known under its beginnings of
some multiples of 64 characters: those that a binary search for n meets. The time is therefore
linear in the searched text, and logarithmic in the length of the longest known text, however many
texts are known and however alike they begin.
"""

from __future__ import annotations

import re
import secrets
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from blake3 import blake3

from ragcache.text import encode_text

__all__ = ["KnownTexts"]

_HEAD = 16  # leading characters that are looked up first; shorter texts match by chance
_STEP = 64  # beginnings are known at multiples of this; a power of 2
_MAX_BACKTRACKS = 16
_DIGEST = 16  # bytes
_WIDTH = 4  # bytes of a character in what is hashed
_BLOCK = _STEP * _WIDTH
#: Where a known text may begin: not within a word.
_START = re.compile(r"(?<!\w)\S")


class Occurrence(NamedTuple):
    """Where a known text stands in a longer one: ``text[start:end]``."""

    start: int
    end: int
    id: str


class KnownTexts:
    """The texts of known chunks, without whitespace around them, to be found in longer texts.

    Texts of less than 16 characters are left out. Texts are not kept: only hashes of them and
    their ids, in all about 600 bytes per text of 1,300 characters. Of equal texts, the first one's
    id is kept.
    """

    def __init__(self, texts: Iterable[tuple[str, str]] = ()) -> None:
        """``texts``: texts and ids, which are read once, one after another."""
        self._modulus = _random_prime()
        self._heads: set[int] = set()
        # By the hash of a beginning: bit n is set if a known text is n characters longer.
        self._beginnings: dict[int, int] = {1: 0}
        self._rows: dict[int, int] = {}  # by the hash of a whole text
        self._ids: list[str] = []
        self._digests = array("B")
        self._longest = 0
        self._powers: dict[int, int] = {}
        for text, id in texts:
            self.add(text, id)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, text: str, id: str) -> None:
        """Add the text of a chunk, which :meth:`find` finds from now on."""
        text = text.strip()
        if len(text) < _HEAD:
            return
        data, hashed, at = _encode(text), 1, 0
        for length in _beginning_lengths(len(text)):
            hashed = _extend(self._modulus, hashed, data[at * _WIDTH : length * _WIDTH])
            self._beginnings.setdefault(hashed, 0)
            at = length
        whole = _extend(self._modulus, hashed, data[at * _WIDTH :])
        if whole in self._rows:
            return
        self._beginnings[hashed] |= 1 << len(text) - at
        self._rows[whole] = len(self._ids)
        self._ids.append(id)
        self._digests.frombytes(_digest(text))
        self._heads.add(hash(text[:_HEAD]))
        self._longest = max(self._longest, len(text))

    def find(self, text: str) -> Iterator[Occurrence]:
        """The known texts in ``text``, in order and without overlaps.

        At each place, the longest is taken. A text is only found if it neither begins within a
        word, nor ends within one of ASCII letters and digits. It may be missed where more than 16
        longer texts begin like ``text`` does there, and go on differently.
        """
        searched: _Searched | None = None
        end = 0
        for match in _START.finditer(text) if self._ids else ():
            start = match.start()
            if start < end or hash(text[start : start + _HEAD]) not in self._heads:
                continue
            searched = searched or _Searched(text, self._modulus, self._powers)
            if found := self._longest_at(searched, start):
                yield found
                end = found.end

    def _longest_at(self, searched: _Searched, start: int) -> Occurrence | None:
        """The longest known text that begins at ``start``."""
        limit = min(self._longest, len(searched.text) - start) + 1
        met: list[int] = []
        for _ in range(_MAX_BACKTRACKS):
            # The longest known beginning of less than `limit` characters...
            length, hashed, bit = 0, 1, 1 << limit.bit_length()
            while bit >= _STEP:
                if length + bit < limit:
                    longer = searched.hash(start, start + length + bit)
                    if longer in self._beginnings:
                        length, hashed = length + bit, longer
                bit >>= 1
            # ... and the known texts that are up to 63 characters longer.
            more = self._beginnings[hashed]
            while more:
                end = start + length + more.bit_length() - 1
                if end < start + limit and (row := self._row(searched, start, end)) is not None:
                    return Occurrence(start, end, self._ids[row])
                more ^= 1 << more.bit_length() - 1
            if not length or hashed in searched.barren:
                break
            met.append(hashed)
            limit = length
        searched.barren.update(met)
        return None

    def _row(self, searched: _Searched, start: int, end: int) -> int | None:
        """The number of the known text ``text[start:end]``; None if it is not one."""
        around = searched.text[end - 1 : end + 1]
        if len(around) == 2 and around.isascii() and around.isalnum():
            return None
        row = self._rows.get(searched.hash(start, end))
        if row is not None:
            digest = self._digests[row * _DIGEST : (row + 1) * _DIGEST].tobytes()
            if digest == _digest(searched.text[start:end]):
                return row
        return None


class _Searched:
    """A text, and the hashes of its beginnings at every 64th character."""

    def __init__(self, text: str, modulus: int, powers: dict[int, int]) -> None:
        self.text = text
        self.barren: set[int] = set()  # hashes of beginnings that no known text is a beginning of
        self._modulus = modulus
        self._powers = powers
        self._data = _encode(text)
        blocks = (self._data[at : at + _BLOCK] for at in range(0, len(self._data), _BLOCK))
        self._hashes = list(accumulate(blocks, partial(_extend, modulus), initial=1))
        self._start = self._at_start = -1

    def hash(self, start: int, end: int) -> int:
        """The hash of ``text[start:end]``; the empty text's is 1."""
        if start != self._start:
            self._start, self._at_start = start, self._before(start) - 1
        length = end - start
        power = self._powers.get(length)
        if power is None:
            power = self._powers[length] = pow(2, 8 * _WIDTH * length, self._modulus)
        return (self._before(end) - self._at_start * power) % self._modulus

    def _before(self, end: int) -> int:
        """The hash of ``text[:end]``."""
        block = end // _STEP
        return _extend(
            self._modulus, self._hashes[block], self._data[block * _BLOCK : end * _WIDTH]
        )


def _encode(text: str) -> bytes:
    return text.encode("utf-32-be", "surrogatepass")


def _extend(modulus: int, hashed: int, data: bytes) -> int:
    """The hash of a longer text: of what ``hashed`` is of, and ``data`` after it."""
    return (hashed << 8 * len(data) | int.from_bytes(data)) % modulus


def _beginning_lengths(length: int) -> Iterator[int]:
    """The multiples of 64 that a binary search for ``length`` meets, from below.

    They are those whose bits are the leading ones of ``length``.
    """
    at = 0
    for bit in range(length.bit_length() - 1, _STEP.bit_length() - 2, -1):
        if length >> bit & 1:
            at |= 1 << bit
            yield at


def _digest(text: str) -> bytes:
    return blake3(encode_text(text)).digest(_DIGEST)


def _random_prime() -> int:
    """A random prime of 61 bits: nobody can make texts whose hashes are equal for it."""
    while True:
        number = secrets.randbits(61) | 1 << 60 | 1
        if all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13)):
            return number
