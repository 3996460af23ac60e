"""Readers of files that contain many documents: JSON Lines, Arrow, Parquet, evaluation sets."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ragcache.errors import SourceError
from ragcache.retriever.encoding import byte_order_mark, decode_source
from ragcache.retriever.extraction import MAX_BYTES, LimitExceeded
from ragcache.retriever.readers import Found, clean_text, make_document, read_contents
from ragcache.retriever.webpage import collapse_blank_lines
from ragcache.types import Document

#: Fields of a record that are read; others are ignored.
_FIELDS = {"text", "page_content", "id", "title", "metadata"}
_MAX_EXPANSION = 100  # bytes of rows per byte of an Arrow or Parquet file
_BATCH_ROWS = 256  # of a Parquet file, read at once


class NotAnEvaluationSet(SourceError):
    """A JSON file that is not an evaluation set; in a folder, it is left out and not an error."""


def read_jsonl(name: str, path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        encoding, _ = byte_order_mark(file.read(4))
        file.seek(0)
        if encoding not in ("", "utf-8"):
            wide = io.TextIOWrapper(file, encoding, errors="replace")
            yield from _records(name, (line.encode() for line in wide), str(path))
            return
        yield from _records(name, _lines(file), str(path))


def read_stdin(name: str, path: Path) -> Iterator[Found]:
    yield from _records(name, _lines(sys.stdin.buffer), "standard input")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_BYTES + 1):
        if len(line) > MAX_BYTES:
            raise LimitExceeded(f"a line of it has more than {MAX_BYTES >> 20} MiB")
        yield line


def _records(name: str, lines: Iterable[bytes], place: str) -> Iterator[Found]:
    for number, raw in enumerate(lines, start=1):
        where = f"{place}:{number}"
        try:
            if line := decode_source(raw, where).strip("\ufeff \t\r\n"):
                yield _record(name, number, _json(line, where), where)
        except SourceError as error:
            yield error


def read_arrow(name: str, path: Path) -> Iterator[Found]:
    """Rows of an Arrow stream (as ``datasets`` writes), an Arrow file, or a Parquet file."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise SourceError(
            f"{path} needs pyarrow, which is not installed. "
            'Run `pip install "ragcache-fusion[arrow]"`.'
        ) from None
    number = 0
    room = MAX_BYTES + _MAX_EXPANSION * path.stat().st_size
    try:
        for batch in _batches(path, room):
            columns = sorted(set(batch.schema.names) & _FIELDS)
            if not {"text", "page_content"} & set(columns):
                raise SourceError(
                    f"{path} has no column text, only {', '.join(batch.schema.names)}. Rename "
                    'one, for instance with `dataset.rename_column("content", "text")`.'
                )
            for at in range(batch.num_rows):
                number += 1
                row = {column: batch.column(column)[at].as_py() for column in columns}
                room -= sum(len(str(value)) for value in row.values())
                if room < 0:
                    raise LimitExceeded(
                        f"its rows have more than {_MAX_EXPANSION} times the bytes of the file, "
                        f"as of row {number}"
                    )
                try:
                    yield _record(name, number, row, f"{path}:{number}", path.suffix[1:])
                except SourceError as error:
                    yield error
    except (pyarrow.ArrowException, ValueError) as error:
        kind = path.suffix[1:].capitalize()
        raise SourceError(
            f"{path} is not a readable {kind} file: {error}. Write it again."
        ) from error


def _batches(path: Path, most: int) -> Iterator[Any]:
    """Record batches; of a Parquet file, only columns that are read.

    Texts that a Parquet file stores once (dictionary encoding) are stored once in memory, too.
    Raises LimitExceeded for a row group of more than ``most`` bytes.
    """
    import pyarrow
    from pyarrow import parquet

    with path.open("rb") as file:
        if path.suffix.lower() != ".parquet":
            if file.read(6) == b"ARROW1":
                found = pyarrow.ipc.open_file(file)
                yield from map(found.get_batch, range(found.num_record_batches))
            else:
                file.seek(0)
                yield from pyarrow.ipc.open_stream(file)
            return
        schema = parquet.read_schema(file)
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        once = sorted(_FIELDS.intersection(texts))
        table = parquet.ParquetFile(file, read_dictionary=once)
        wanted = [name for name in schema.names if name in _FIELDS] or schema.names[:1]
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            columns = map(group.column, range(group.num_columns))
            size = sum(
                column.total_uncompressed_size
                for column in columns
                if column.path_in_schema.split(".")[0] in wanted
            )
            if size > most:
                raise LimitExceeded(f"{size >> 20} MiB are in one row group of it")
        if not {"text", "page_content"} & set(wanted):
            yield pyarrow.RecordBatch.from_pylist([], schema=schema)
            return
        yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted)


def _record(name: str, number: int, record: Any, where: str, kind: str = "jsonl") -> Document:
    """A document from a JSON object or a row; ``metadata`` values that are not strings: as JSON."""
    wanted = 'Each must be like {"text": "...", "id": "...", "title": "..."}.'
    if isinstance(record, dict) and record.get("lc") == 1:  # written by langchain_core.load.dumps
        record = record.get("kwargs")
    text = record.get("text", record.get("page_content")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise SourceError(f'{where} has no string "text". {wanted}')
    key, title = record.get("id"), record.get("title") or ""
    if isinstance(key, bool) or not isinstance(key, str | int | None) or not isinstance(title, str):
        raise SourceError(f'{where}: "id" or "title" is not a string. {wanted}')
    extra = record.get("metadata") or {}
    if not isinstance(extra, dict):
        raise SourceError(f'{where}: "metadata" is not an object. Write {{"key": "..."}}.')
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in extra.items()}
    label = f"{name}:{number}" if key is None or key == "" else clean_text(f"{name}#{key}")
    defaults = {"source": name, "format": kind}
    return make_document(label, title, text, **(defaults | metadata))


def read_cacheblend(name: str, path: Path) -> Iterator[Found]:
    """The distinct passages of all questions of a CacheBlend evaluation set, in order."""
    from xxhash import xxh3_64_hexdigest

    shape = 'Expected [{"ctxs": [{"title": "...", "text": "..."}], ...}]; other JSON: use .jsonl.'
    try:
        data = _json(decode_source(read_contents(path), str(path)), str(path))
    except SourceError as error:
        raise NotAnEvaluationSet(str(error)) from None
    if not isinstance(data, list) or not any(isinstance(q, dict) and "ctxs" in q for q in data):
        raise NotAnEvaluationSet(f"{path} is not an evaluation set. {shape}")
    seen = set()
    for number, question in enumerate(data):
        passages = question.get("ctxs") if isinstance(question, dict) else None
        for passage in passages if isinstance(passages, list) else [None]:
            passage = passage if isinstance(passage, dict) else {}
            title, text = passage.get("title") or "", passage.get("text")
            if not isinstance(title, str) or not isinstance(text, str):
                yield SourceError(f"{path}: question {number} has a malformed passage. {shape}")
                continue
            label = xxh3_64_hexdigest(clean_text(f"{title}\n\n{text}").encode())
            if label not in seen:
                seen.add(label)
                yield make_document(
                    f"{name}#{label}",
                    title,
                    collapse_blank_lines(text),
                    source=name,
                    format="cacheblend",
                )


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} is not valid JSON: {error}. Correct or remove it.") from None
