"""Text that can be encoded: what comes from outside may hold halves of characters."""

from __future__ import annotations

from typing import Any


def replace_surrogates(text: str) -> str:
    """The same text without halves of surrogate pairs: two that make a character become it, any
    other is U+FFFD.

    JSON may say ``"\\ud83d"``, and a command line's bytes that are no UTF-8 come as such halves:
    no tokenizer takes them, and no record or answer can hold them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def replace_surrogates_in(value: Any) -> Any:
    """A value as JSON has them, with every string and every key :func:`replace_surrogates`."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [replace_surrogates_in(one) for one in value]
    if isinstance(value, dict):
        return {
            replace_surrogates_in(key): replace_surrogates_in(one) for key, one in value.items()
        }
    return value


def encode_text(text: str) -> bytes:
    """UTF-8, also of halves, which paths may hold; :func:`decode_text` gives the same text back."""
    return text.encode(errors="surrogatepass")


def decode_text(data: bytes) -> str:
    """What :func:`encode_text` was given."""
    return data.decode(errors="surrogatepass")
