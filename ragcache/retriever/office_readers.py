"""Readers of Office files: Word, PowerPoint, Excel. Their libraries are the extra ``formats``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from ragcache.errors import SourceError
from ragcache.retriever import extraction
from ragcache.retriever.archive import Archive, read_archive
from ragcache.retriever.extraction import MAX_BYTES, ExtractedText, Omitted, TimeLimit
from ragcache.retriever.office import extract_docx, extract_pptx
from ragcache.retriever.readers import Found, clean_text, make_document
from ragcache.retriever.tables import Row, numbered, parts
from ragcache.types import Document

_MAX_SHEETS_BYTES = 4 * MAX_BYTES  # of the XML of a workbook, which is read row by row
_CELL = re.compile(rb"<(?:\w+:)?c[ />]")
#: A cell whose formula has no stored result.
_NO_RESULT = re.compile(
    rb"</(?:\w+:)?f>\s*(?:<(?:\w+:)?v\s*/>|<(?:\w+:)?v>\s*</(?:\w+:)?v>)?\s*</(?:\w+:)?c>"
)


def read_docx(name: str, path: Path) -> Iterator[Found]:
    yield from _one(name, path, extract_docx, "docx")


def read_pptx(name: str, path: Path) -> Iterator[Found]:
    yield from _one(name, path, extract_pptx, "pptx")


def read_xlsx(name: str, path: Path) -> Iterator[Found]:
    """The sheets of a workbook as tables; the title of each is its name."""
    import openpyxl

    clock = TimeLimit(extraction.MAX_TABLE_SECONDS)
    archive = read_archive(path, _holds_text, clock, most=_MAX_SHEETS_BYTES)
    empty = True
    with _readable(path):
        book = openpyxl.load_workbook(archive.copy(), read_only=True, data_only=True)
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # what a sheet says of them can be false
            for label, part in numbered(f"{name}#{sheet.title}", parts(_rows(sheet), clock)):
                if not part:
                    continue
                empty = False
                metadata = {"source": name, "format": "xlsx", "sheet": sheet.title}
                with clock.paused():
                    yield make_document(label, sheet.title, part, **metadata)
    if empty:
        raise SourceError(f"{path} holds no text: all of its sheets are empty. Leave it out.")
    yield from _embedded(path, archive)
    sheets = [raw for member, raw in archive.members.items() if "/worksheets/" in member]
    if unsolved := sum(len(_NO_RESULT.findall(raw)) for raw in sheets):
        kept = sum(len(_CELL.findall(raw)) for raw in sheets) - unsolved
        why = (
            "their formulas have no stored results. Open the file in a spreadsheet program and "
            "save it."
        )
        yield Omitted(str(path), unsolved, kept, "cells", why)


def _one(
    name: str, path: Path, extract: Callable[[IO[bytes], TimeLimit], ExtractedText], kind: str
) -> Iterator[Found]:
    clock = TimeLimit()
    archive = read_archive(path, _holds_text, clock, most=MAX_BYTES)
    with _readable(path):
        found = extract(archive.copy(), clock)
    pictures = sum("/media/" in member for member in archive.others)
    if not found.text:
        raise SourceError(
            f"{path} holds no text, and {pictures} pictures. If they show text, export the file "
            "as PDF, and run OCR on that, for instance `ocrmypdf in.pdf out.pdf`."
        )
    yield from found.omitted(str(path))
    yield from _embedded(path, archive)
    title = {"title": clean_text(found.title)} if found.title else {}
    yield Document(name, clean_text(found.text), {"source": name, "format": kind} | title)


def _holds_text(member: str) -> bool:
    return member.lower().endswith((".xml", ".rels"))


def _embedded(path: Path, archive: Archive) -> Iterator[Omitted]:
    """What to report of files inside of an Office file: nothing, or one part."""
    if inner := [member for member in archive.others if "/embeddings/" in member]:
        why = f"files inside of it, such as {inner[0]}. Save those that you need beside it."
        yield Omitted(str(path), len(inner), 1, "files", why)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise SourceError for what the libraries raise for damaged files."""
    try:
        yield
    except _damages() as error:
        raise SourceError(
            f"{path} is not a readable {path.suffix} file: {str(error) or type(error).__name__}. "
            "It may be damaged: save it again with the program that it is from."
        ) from error


def _damages() -> tuple[type[Exception], ...]:
    """Almost any built-in error, and those of the libraries that are installed."""
    from xml.parsers.expat import ExpatError
    from zipfile import BadZipFile

    found: list[type[Exception]] = [ExpatError, BadZipFile]
    found += [ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError]
    found += [RecursionError, NotImplementedError, EOFError, OSError, SyntaxError]
    with suppress(ModuleNotFoundError):
        from pptx.exc import PythonPptxError

        found.append(PythonPptxError)
    with suppress(ModuleNotFoundError):
        from openpyxl.utils.exceptions import InvalidFileException

        found.append(InvalidFileException)
    return tuple(found)


def _rows(sheet: Any) -> Iterator[Row]:
    for row in sheet.iter_rows(values_only=True):
        yield ["" if value is None else _shown(value) for value in row]


def _shown(value: object) -> str:
    """A cell's value; of a date without a time, only the date."""
    if isinstance(value, datetime) and not any((value.hour, value.minute, value.second)):
        return value.date().isoformat()
    return str(value)
