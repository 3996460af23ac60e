"""Readers of files that contain one document: text, source code, Markdown, HTML, PDF."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever.encoding import decode
from ragcache.retriever.extraction import MAX_BYTES, LimitExceeded, Omitted
from ragcache.retriever.formats import extract_markdown, extract_pdf
from ragcache.retriever.webpage import extract_html
from ragcache.text import replace_surrogates
from ragcache.types import Document

#: What a reader yields: a document, an error about a part, or a part that was left out.
Found = Document | SourceError | Omitted
#: Metadata that readers set; fields of these names in a document's front matter are ignored.
RESERVED_METADATA = {"source", "format", "ragcache"}


def read_text(name: str, path: Path) -> Iterator[Found]:
    text, metadata = read_decoded(path)
    yield make_document(name, "", text, source=name, format="text", **metadata)


def read_code(name: str, path: Path) -> Iterator[Found]:
    """Source code, configuration and markup that is read as it is written."""
    text, metadata = read_decoded(path, page=path.suffix.lower() == ".xml")
    yield make_document(name, "", text, source=name, format="code", **metadata)


def read_markdown(name: str, path: Path) -> Iterator[Found]:
    text, more = read_decoded(path)
    found = extract_markdown(clean_text(text))
    yield from found.omitted(str(path))
    metadata = {k: v for k, v in found.metadata.items() if k not in RESERVED_METADATA}
    metadata |= {"source": name, "format": "markdown", **more}
    headings = (line.lstrip("#").strip() for line in found.text.split("\n") if line[:1] == "#")
    if found.title in headings:  # the text contains the title already
        yield Document(name, found.text, metadata | {"title": found.title})
    else:
        yield make_document(name, found.title, found.text, **metadata)


def read_html(name: str, path: Path) -> Iterator[Found]:
    text, metadata = read_decoded(path, page=True)
    found = extract_html(clean_text(text))
    yield from found.omitted(str(path))
    yield make_document(name, found.title, found.text, source=name, format="html", **metadata)


def read_pdf(name: str, path: Path) -> Iterator[Found]:
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    try:
        with path.open("rb") as stream:
            found = extract_pdf(stream)
    except (FileNotDecryptedError, DependencyError) as error:
        fix = (
            "Remove its password, for instance with `qpdf --decrypt`."
            if isinstance(error, FileNotDecryptedError)
            else "Run `pip install cryptography`, or `qpdf --decrypt` on the file."
        )
        raise SourceError(f"{path} is encrypted: {error}. {fix}") from error
    # For damaged files, pypdf raises almost any built-in error.
    except (
        *(PyPdfError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
        *(AssertionError, RecursionError, NotImplementedError, EOFError, struct.error, zlib.error),
    ) as error:
        raise SourceError(
            f"{path} is not a readable PDF: {str(error) or type(error).__name__}. "
            "It may be truncated: get it again, or repair it with `qpdf in.pdf out.pdf`."
        ) from error
    if not found.text:
        raise SourceError(
            f"{path} holds no text: its pages are probably scans. Run OCR on it first, for "
            "instance `ocrmypdf in.pdf out.pdf`."
        )
    yield from found.omitted(str(path))
    # The title in a PDF's properties is often that of a template: it is metadata, not text.
    title = {"title": clean_text(found.title)} if found.title else {}
    yield Document(name, clean_text(found.text), {"source": name, "format": "pdf"} | title)


def make_document(id: str, heading: str, text: str, /, **metadata: str) -> Document:
    """A document with ``heading`` as its title.

    The title is put above the text, unless the text begins with it.
    """
    title, text = clean_text(heading).strip(), clean_text(text)
    if title:
        metadata["title"] = title
        if text.lstrip("# ").split("\n", 1)[0].strip() != title:
            text = f"{title}\n\n{text}"
    return Document(id, text, {clean_text(k): clean_text(v) for k, v in metadata.items()})


def read_decoded(path: Path, *, page: bool = False) -> tuple[str, dict[str, str]]:
    """The text of a file, and the name of its encoding as metadata ``encoding`` if it is a guess.

    ``page``: it may declare its encoding as HTML and XML do.
    """
    text, guess = decode(read_contents(path), str(path), page=page)
    return text, {"encoding": guess} if guess else {}


def read_contents(path: Path) -> bytes:
    """The bytes of a file. Raises LimitExceeded beyond :data:`MAX_BYTES`."""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise LimitExceeded(f"it has more than {MAX_BYTES >> 20} MiB")
    return raw


def clean_text(text: str) -> str:
    """Text that every tokenizer accepts: newlines as ``\\n``, no NUL, no unpaired surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return replace_surrogates(text)
