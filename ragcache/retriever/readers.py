"""Files that are one document each: text, Markdown, HTML, PDF."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever.formats import html_text, markdown_text, pdf_text
from ragcache.text import whole
from ragcache.types import Document


def read_text(name: str, path: Path) -> Iterator[Document]:
    yield document(name, "", decoded(path.read_bytes(), str(path)), source=name, format="text")


def read_markdown(name: str, path: Path) -> Iterator[Document]:
    title, text = markdown_text(sound(decoded(path.read_bytes(), str(path))))
    metadata = {"source": name, "format": "markdown"} | ({"title": title} if title else {})
    yield Document(name, text, metadata)  # its title is one of its headings: not said twice


def read_html(name: str, path: Path) -> Iterator[Document]:
    title, text = html_text(sound(decoded(path.read_bytes(), str(path))))
    yield document(name, title, text, source=name, format="html")


def read_pdf(name: str, path: Path) -> Iterator[Document]:
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    try:
        with path.open("rb") as stream:
            title, text = pdf_text(stream)
    except (FileNotDecryptedError, DependencyError) as error:
        fix = (
            "Remove its password, for instance with `qpdf --decrypt`."
            if isinstance(error, FileNotDecryptedError)
            else "Run `pip install cryptography`, or `qpdf --decrypt` on the file."
        )
        raise SourceError(f"{path} is encrypted: {error}. {fix}") from error
    # Damaged files take pypdf to places that it does not guard: these are the errors of parsing.
    except (
        *(PyPdfError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
        *(AssertionError, RecursionError, NotImplementedError, EOFError, struct.error, zlib.error),
    ) as error:
        raise SourceError(
            f"{path} is not a readable PDF: {str(error) or type(error).__name__}. "
            "It may be truncated: get it again, or repair it with `qpdf in.pdf out.pdf`."
        ) from error
    if not text:
        raise SourceError(
            f"{path} holds no text: its pages are probably scans. Run OCR on it first, for "
            "instance `ocrmypdf in.pdf out.pdf`."
        )
    # The title in a PDF's properties is often a leftover of its template: metadata, not text.
    metadata = {"source": name, "format": "pdf"} | ({"title": sound(title)} if title else {})
    yield Document(name, sound(text), metadata)


def document(name: str, title: str, text: str, **metadata: str) -> Document:
    title, text = sound(title).strip(), sound(text)
    if title:
        metadata["title"] = title
        if text.lstrip("# ").split("\n", 1)[0].strip() != title:
            text = f"{title}\n\n{text}"
    return Document(name, text, metadata)


def sound(text: str) -> str:
    """Text that every tokenizer takes: newlines as ``\\n``, no NUL, no half of a surrogate pair."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return whole(text)


def decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{place} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}). "
            "Convert it, for instance with `iconv -f WINDOWS-1252 -t UTF-8`."
        ) from None
