"""Decode files: by byte order mark, as UTF-8, or as a web page declares."""

from __future__ import annotations

import codecs

from ragcache.errors import SourceError

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
#: Guesses for undeclared encodings, which error messages suggest, the most common first:
#: https://w3techs.com/technologies/overview/character_encoding
_GUESSES = [
    *("cp1252", "cp1251", "cp932", "euc_jp", "gb18030", "cp949", "cp1250", "big5", "koi8_r"),
    *("cp1253", "cp1254", "cp1255", "cp1256"),
]
_SAMPLE_BYTES = 1 << 16  # that a guess is based on


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
    at = length + fault.start
    wrong = f"{place} is not {fault.encoding.upper()} (byte 0x{raw[at]:02x} at offset {at})"
    if name:
        raise SourceError(
            f"{wrong}, although it begins with that byte order mark: it is damaged. Get it again."
        )
    if guess := _guess(raw):
        raise SourceError(
            f"{wrong}. It may be {guess}: convert it with `iconv -f {guess} -t UTF-8`, and check "
            "the result."
        )
    raise SourceError(
        f"{wrong}, and its encoding cannot be guessed. Save it as UTF-8, or leave it out."
    )


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


def _guess(raw: bytes) -> str:
    from charset_normalizer import from_bytes

    likely = ["utf_16_le", "utf_16_be"] if b"\0" in raw else _GUESSES
    found = from_bytes(raw[:_SAMPLE_BYTES], cp_isolation=likely)
    if not found:
        return ""
    # Among equally plausible codecs the library sorts by name, which would take French for Polish.
    _, _, best = min(
        (one.chaos, -one.coherence, likely.index(codec))
        for one in found
        for codec in one.could_be_from_charset
    )
    name = likely[best].replace("utf_16_", "utf-16").replace("cp125", "windows-125")
    return name.replace("_", "-").upper()
