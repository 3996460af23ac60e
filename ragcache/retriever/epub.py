"""Read EPUB books: the chapters in reading order, as web pages are read."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from ragcache.errors import SourceError
from ragcache.retriever.archive import Archive, read_archive
from ragcache.retriever.encoding import decode
from ragcache.retriever.extraction import MAX_BYTES, Omitted, TimeLimit
from ragcache.retriever.readers import Found, clean_text, make_document
from ragcache.retriever.webpage import extract_html

_CONTAINER = "META-INF/container.xml"
_PAGES = (".xhtml", ".html", ".htm", ".xml", ".opf")
_NAMES = {
    "c": "urn:oasis:names:tc:opendocument:xmlns:container",
    "opf": "http://www.idpf.org/2007/opf",
    "dc": "http://purl.org/dc/elements/1.1/",
}


def read_epub(name: str, path: Path) -> Iterator[Found]:
    """One document; metadata has ``author`` and ``language`` if the book has."""
    clock = TimeLimit()
    archive = read_archive(path, _is_read, clock, most=MAX_BYTES)
    try:
        package = _package(archive)
        book = ElementTree.fromstring(archive.members[package])
        chapters = list(_spine(book, package))
    except (ElementTree.ParseError, LookupError) as error:
        raise SourceError(
            f"{path} is not a readable EPUB: {error}. It may be truncated: get it again."
        ) from error
    if "META-INF/encryption.xml" in archive.members and _is_protected(archive):
        raise SourceError(
            f"{path} is protected against copying: its text is encrypted. Leave it out, or get it "
            "without protection."
        )
    texts, missing = list[str](), 0
    for chapter in chapters:
        raw = archive.members.get(chapter)
        if raw is None:
            missing += 1
            continue
        source, _ = decode(raw, f"{path}:{chapter}", page=True)
        page = extract_html(clean_text(source), clock)
        texts.append(page.text)
        yield from page.omitted(f"{path}:{chapter}")
    text = "\n\n".join(filter(None, texts))
    if not text:
        raise SourceError(
            f"{path} holds no text: its pages are probably pictures. Get the book as PDF, and run "
            "OCR on that, for instance `ocrmypdf in.pdf out.pdf`."
        )
    if missing:
        why = "chapters that the book names and does not hold. Get the file again."
        yield Omitted(str(path), missing, len(texts), "parts", why)
    about = {"author": _named(book, "creator"), "language": _named(book, "language")}
    metadata = {"source": name, "format": "epub"} | {k: v for k, v in about.items() if v}
    yield make_document(name, _named(book, "title"), text, **metadata)


def _is_read(member: str) -> bool:
    return member.lower().endswith(_PAGES)


def _package(archive: Archive) -> str:
    """The name of the member that lists a book's parts. Raises LookupError."""
    root = ElementTree.fromstring(archive.members[_CONTAINER])
    found = root.find(".//c:rootfile", _NAMES)
    if found is None:
        raise LookupError("it names no package")
    return found.attrib["full-path"]


def _spine(book: ElementTree.Element, package: str) -> Iterator[str]:
    """The members of a book's chapters, in reading order."""
    folder = posixpath.dirname(package)
    items = {
        one.get("id"): one.get("href", "") for one in book.iterfind("opf:manifest/opf:item", _NAMES)
    }
    for one in book.iterfind("opf:spine/opf:itemref", _NAMES):
        if href := items.get(one.get("idref"), ""):
            yield posixpath.normpath(posixpath.join(folder, unquote(href.partition("#")[0])))


def _is_protected(archive: Archive) -> bool:
    """Whether pages are encrypted; fonts often are, which matters to nobody here."""
    root = ElementTree.fromstring(archive.members["META-INF/encryption.xml"])
    named = (unquote(one.get("URI", "")).lower() for one in root.iter() if one.get("URI"))
    return any(one.endswith(_PAGES) for one in named)


def _named(book: ElementTree.Element, what: str) -> str:
    """The values of a field of the book's metadata, joined by commas."""
    found = (one.text or "" for one in book.iterfind(f"opf:metadata/dc:{what}", _NAMES))
    return ", ".join(filter(None, (" ".join(text.split()) for text in found)))
