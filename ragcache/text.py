"""Unpaired surrogates, which text from outside can contain, and which UTF-8 cannot encode."""

from __future__ import annotations

from typing import Any

__all__ = ["decode_text", "encode_text", "replace_surrogates", "replace_surrogates_in"]


def replace_surrogates(text: str) -> str:
    """The text with surrogate pairs joined, and unpaired surrogates replaced by U+FFFD.

    JSON can contain an unpaired ``"\\ud83d"``, and Python decodes command line bytes that are not
    UTF-8 to such surrogates. Tokenizers reject them, and no record or answer can contain them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def replace_surrogates_in(value: Any) -> Any:
    """A JSON value with :func:`replace_surrogates` applied to every string and key."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, (list, tuple)):
        return [replace_surrogates_in(one) for one in value]
    if isinstance(value, dict):
        return {
            replace_surrogates_in(key): replace_surrogates_in(one) for key, one in value.items()
        }
    return value


def encode_text(text: str) -> bytes:
    """Encode as UTF-8, including unpaired surrogates, which paths can contain."""
    return text.encode(errors="surrogatepass")


def decode_text(data: bytes) -> str:
    """The inverse of :func:`encode_text`."""
    return data.decode(errors="surrogatepass")
