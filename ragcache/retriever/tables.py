"""Tables (CSV, spreadsheets) as text: a paragraph for each row, with a line for each cell.

A line is ``header: value``. A chunk is found, and its KV computed, without the rows above it: in a
Markdown table it would not know its columns. Tables inside of running text, which are short, have
a line for each row instead.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever import extraction
from ragcache.retriever.encoding import stream_encoding
from ragcache.retriever.extraction import MAX_BYTES, LimitExceeded, TimeLimit
from ragcache.retriever.readers import Found, make_document

Row = Sequence[str]

PART_ROWS = 1000  # of a table, in one document
_MAX_NAME = 100  # characters of a column's name, which is repeated in every row
_PEEKED = 20  # rows in which the header is looked for
_SAMPLE = 1 << 16  # bytes in which the delimiter is looked for
_DELIMITERS = ",;\t|"


def read_csv(name: str, path: Path) -> Iterator[Found]:
    """CSV, with the delimiter that its first rows suggest, and TSV."""
    clock = TimeLimit(extraction.MAX_TABLE_SECONDS)
    with path.open("rb") as file:
        encoding, guess = stream_encoding(file, str(path))
        metadata = {"source": name, "format": "csv"} | ({"encoding": guess} if guess else {})
        at, sample = file.tell(), file.read(_SAMPLE).decode(encoding, "ignore")
        file.seek(at)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(sample)
        rows = csv.reader(
            io.TextIOWrapper(file, encoding, "replace", newline=""), delimiter=delimiter
        )
        try:
            for label, part in numbered(name, parts(rows, clock)):
                with clock.paused():
                    yield make_document(label, "", part, **metadata)
        except csv.Error as error:
            raise SourceError(
                f"{path}:{rows.line_num} is not valid CSV: {error}. Check its quotes."
            ) from error


def numbered(name: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The ids of a table's parts: its name for the first, so that a table may grow, and then with
    the number of the first row, such as ``a.csv:1001``."""
    for number, text in enumerate(texts):
        yield (f"{name}:{number * PART_ROWS + 1}" if number else name), text


def parts(rows: Iterable[Row], clock: TimeLimit) -> Iterator[str]:
    """The text of each :data:`PART_ROWS` rows, at least one.

    The header is the first of the first rows that is as wide as the table and has only distinct
    names in it; rows above it, such as a title, are lines of their own. Without one, the cells of a
    row are separated by ``|``. Empty cells and rows are left out.
    """
    each = filter(any, (_cleaned(row, clock) for row in rows))
    peeked = list(islice(each, _PEEKED))
    width = max(map(len, peeked), default=0)
    at = next((n for n, row in enumerate(peeked) if _is_header(row, width)), -1)
    header = peeked[at] if at >= 0 else []
    above = [_paragraph([], row) for row in peeked[: max(0, at)]]
    paragraphs = (_paragraph(header, row) for row in chain(peeked[at + 1 :], each))
    yield _joined([*above, *islice(paragraphs, PART_ROWS)] or [_paragraph([], header)])
    while some := list(islice(paragraphs, PART_ROWS)):
        yield _joined(some)


def _joined(paragraphs: list[str]) -> str:
    """Raises LimitExceeded for more than :data:`MAX_BYTES` characters."""
    if sum(map(len, paragraphs)) > MAX_BYTES:
        raise LimitExceeded(
            f"{len(paragraphs)} rows of it have more than {MAX_BYTES >> 20} Mi characters, with "
            "the names of their columns"
        )
    return "\n\n".join(paragraphs)


def _cleaned(row: Row, clock: TimeLimit) -> list[str]:
    """The cells on a line each, without those at the end that are empty."""
    clock.check()
    cells = [" ".join(cell.split()) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _is_header(row: Row, width: int) -> bool:
    """Whether a row has a name for each of at least two columns."""
    named = len(row) == width >= 2 and len(set(row)) == len(row)
    return named and all(0 < len(cell) <= _MAX_NAME and not _is_number(cell) for cell in row)


def _is_number(cell: str) -> bool:
    return not cell.strip("+-0123456789.,:/%eE ")


def _paragraph(header: Row, row: Row) -> str:
    if not header:
        return " | ".join(filter(None, row))
    named = (f"{name}: {cell}" for name, cell in zip(header, row, strict=False) if cell)
    return "\n".join([*named, *filter(None, row[len(header) :])])


def _delimiter(text: str) -> str:
    """The delimiter by which most of the first lines have the same number of cells, above 1."""

    def agreeing(delimiter: str) -> tuple[int, int]:
        lines = text.splitlines(keepends=True)[: _PEEKED + 1]
        try:
            widths = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            return 0, 0
        usual = max(widths, key=widths.count, default=1)
        return (widths.count(usual), usual) if usual > 1 else (0, 0)

    return max(_DELIMITERS, key=agreeing)
