"""Decode files: by byte order mark, as UTF-8, as a page declares, or by a guess.

A guess can be wrong, so it is never silent: what is decoded by one comes with the name of the
encoding, which becomes metadata of the document.
"""

from __future__ import annotations

import codecs
from contextlib import suppress
from typing import IO, TYPE_CHECKING, NamedTuple

from ragcache.errors import SourceError

if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

#: Longer ones first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: The codec that browsers use for a declared one, https://encoding.spec.whatwg.org/#names-and-labels
_BROWSER_CODECS = {
    **{"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874"},
    **{"shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949"},
    **{"big5": "big5hkscs", "utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8"},
}
#: Guesses for undeclared encodings, the most common first:
#: https://w3techs.com/technologies/overview/character_encoding
_GUESSES = [
    *("cp1252", "cp1251", "cp932", "euc_jp", "gb18030", "cp949", "cp1250", "big5", "koi8_r"),
    *("cp1253", "cp1254", "cp1255", "cp1256"),
]
_SAMPLE_BYTES = 1 << 16  # that a guess is based on
_WIDE_UNITS = 4  # least length of UTF-16 without a byte order mark
_PIECE_BYTES = 1 << 20  # of a file that is checked without being held
#: Characters that no text has, but that codecs make of other files.
_NO_TEXT = {chr(code) for code in range(32)} - set("\t\n\r\f\x1a\x1b")


class Decoded(NamedTuple):
    """A text, and the name of its encoding if that was guessed, else ""."""

    text: str
    guess: str


class UndeclaredEncoding(SourceError):
    """Text that is not UTF-8 and does not say what it is. ``guess`` is "" if there is none."""

    def __init__(self, message: str, guess: str) -> None:
        super().__init__(message)
        self.guess = guess


def byte_order_mark(raw: bytes) -> tuple[str, int]:
    """The codec and length in bytes of the byte order mark of ``raw``; ("", 0) without one."""
    found = ((name, len(bom)) for bom, name in _BYTE_ORDER_MARKS if raw.startswith(bom))
    return next(found, ("", 0))


def decode_source(raw: bytes, place: str, *, page: bool = False) -> str:
    """Decode ``raw``. ``place`` names it in errors; ``page``: it may declare its encoding as HTML.

    Raises SourceError, with a guess of the encoding, if it is neither declared nor UTF-8.
    """
    name, length = byte_order_mark(raw)
    encodings = [name] if name else ["utf-8"]
    declared = _declared(raw) if page and not name else ""
    if declared:  # text that decodes as UTF-8 beyond ASCII is UTF-8, whatever it declares
        encodings = [declared, "utf-8"] if raw.isascii() else ["utf-8", declared]
    for encoding in encodings:
        try:
            return raw[length:].decode(encoding)
        except UnicodeDecodeError as error:
            fault = error
    if not name:
        raise _undeclared(raw, fault, place, 0)
    raise SourceError(
        f"{place} is not {fault.encoding.upper()} (byte 0x{raw[length + fault.start]:02x} at "
        f"offset {length + fault.start}), although it begins with that byte order mark: it is "
        "damaged. Get it again."
    )


def decode(raw: bytes, place: str, *, page: bool = False) -> Decoded:
    """As :func:`decode_source`, but by the guess where there is one that fits all of ``raw``."""
    if (wide := _wide_codec(raw)) and not byte_order_mark(raw)[0]:
        with suppress(UnicodeDecodeError):
            return Decoded(raw.decode(wide), wide)
    try:
        return Decoded(decode_source(raw, place, page=page), "")
    except UndeclaredEncoding as error:
        with suppress(UnicodeDecodeError):
            if error.guess and not _NO_TEXT.intersection(text := raw.decode(error.guess)):
                return Decoded(text, error.guess)
        raise


def stream_encoding(file: IO[bytes], place: str) -> tuple[str, str]:
    """The encoding of a file that is not held in memory, and its name again if it is a guess.

    ``file`` is read to its end, and then placed behind its byte order mark. Raises as
    :func:`decode_source`.
    """
    head = file.read(_SAMPLE_BYTES)
    name, length = byte_order_mark(head)
    file.seek(length)
    if name:
        return name, ""
    if wide := _wide_codec(head):
        return wide, wide
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    guess = ""
    while piece := file.read(_PIECE_BYTES):
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as fault:
            # The fault counts from the bytes that the piece before it has left over.
            guess = _undeclared(fault.object, fault, place, offset).guess
            if not guess:
                raise _undeclared(fault.object, fault, place, offset) from None
            break
        offset += len(piece)
    file.seek(0)
    return guess or "utf-8", guess


def _declared(raw: bytes) -> str:
    """The codec that a page's ``<meta charset>`` or XML declaration names, or ""."""
    from bs4.dammit import EncodingDetector

    label = EncodingDetector.find_declared_encoding(raw, is_html=True)
    try:
        name = codecs.lookup(label or "").name
    except LookupError:
        return ""
    name = _BROWSER_CODECS.get(name, name)
    safe = ("utf-8", "iso", "cp", "mac", "koi8", "gb", "big5", "euc")
    return name if name.startswith(safe) else ""


def _undeclared(
    raw: bytes, fault: UnicodeDecodeError, place: str, offset: int
) -> UndeclaredEncoding:
    """The error about ``raw``, which begins at ``offset`` of its file."""
    wrong = (
        f"{place} is not {fault.encoding.upper()} (byte 0x{raw[fault.start]:02x} at offset "
        f"{offset + fault.start})"
    )
    # A line whose bytes are not ASCII, for most of a file may be.
    begin = 0 if fault.start < _SAMPLE_BYTES else raw.rfind(b"\n", 0, fault.start) + 1
    if guess := _guess(raw[begin : begin + _SAMPLE_BYTES]):
        return UndeclaredEncoding(
            f"{wrong}. It may be {guess}: convert it with `iconv -f {guess} -t UTF-8`, and check "
            "the result.",
            guess,
        )
    return UndeclaredEncoding(
        f"{wrong}, and its encoding cannot be guessed. Save it as UTF-8, or leave it out.", ""
    )


def _wide_codec(raw: bytes) -> str:
    """UTF-16LE or UTF-16BE if every other byte is mostly one of 0 to 8, as in all alphabets; else
    "". Such bytes are valid UTF-8, too."""
    sample = raw[: _SAMPLE_BYTES & -2]
    half = len(sample) // 2
    low, high = (sum(map(sample[at::2].count, range(9))) for at in (0, 1))
    if half >= _WIDE_UNITS and max(low, high) > 0.6 * half and min(low, high) < 0.05 * half:
        return "UTF-16LE" if high > low else "UTF-16BE"
    return ""


def _guess(raw: bytes) -> str:
    from charset_normalizer import from_bytes

    likely = ["utf_16_le", "utf_16_be"] if b"\0" in raw else _GUESSES
    found = from_bytes(raw, cp_isolation=likely)
    if not found:
        return ""
    # Among equally plausible codecs the library sorts by name, which would take French for Polish.
    *_, best = min(
        (one.chaos, _halfwidth(one), -one.coherence, likely.index(codec))
        for one in found
        for codec in one.could_be_from_charset
    )
    name = likely[best].replace("utf_16_", "utf-16").replace("cp125", "windows-125")
    return name.replace("_", "-").upper()


def _halfwidth(found: CharsetMatch) -> bool:
    """Whether much of a text is halfwidth katakana, which Chinese in GB 18030 is as Shift JIS."""
    text = str(found)
    return sum("\uff61" <= sign <= "\uff9f" for sign in text) > len(text) / 5
