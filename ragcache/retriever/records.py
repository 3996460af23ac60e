"""Files of many documents: JSON Lines, Arrow and Parquet, CacheBlend's evaluation sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ragcache.errors import SourceError
from ragcache.retriever.formats import tidy
from ragcache.retriever.readers import decoded, document, sound
from ragcache.types import Document

#: Of a record, what is read; all else in it is passed over.
_FIELDS = {"text", "page_content", "id", "title", "metadata"}


def read_jsonl(name: str, path: Path) -> Iterator[Document | SourceError]:
    with path.open("rb") as lines:
        yield from _records(name, lines, str(path))


def read_stdin(name: str, path: Path) -> Iterator[Document | SourceError]:
    yield from _records(name, sys.stdin.buffer, "standard input")


def _records(name: str, lines: Iterable[bytes], place: str) -> Iterator[Document | SourceError]:
    for number, raw in enumerate(lines, start=1):
        where = f"{place}:{number}"
        try:
            if line := decoded(raw, where).strip():
                yield _record(name, number, _json(line, where), where)
        except SourceError as error:
            yield error


def read_arrow(name: str, path: Path) -> Iterator[Document | SourceError]:
    """Rows of an Arrow stream, which ``datasets`` writes, an Arrow file, or a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise SourceError(
            f"{path} needs pyarrow, which is not installed. "
            'Run `pip install "ragcache-fusion[arrow]"`.'
        ) from None
    number = 0
    try:
        with path.open("rb") as file:
            if path.suffix == ".parquet":
                batches = parquet.ParquetFile(file).iter_batches()
            elif file.read(6) == b"ARROW1":
                whole = pyarrow.ipc.open_file(file)
                batches = map(whole.get_batch, range(whole.num_record_batches))
            else:
                file.seek(0)
                batches = iter(pyarrow.ipc.open_stream(file))
            for batch in batches:
                columns = sorted(set(batch.schema.names) & _FIELDS)
                if not {"text", "page_content"} & set(columns):
                    raise SourceError(
                        f"{path} has no column text, only {', '.join(batch.schema.names)}. Rename "
                        'one, for instance with `dataset.rename_column("content", "text")`.'
                    )
                for row in batch.select(columns).to_pylist():
                    number += 1
                    try:
                        yield _record(name, number, row, f"{path}:{number}", path.suffix[1:])
                    except SourceError as error:
                        yield error
    except (pyarrow.ArrowException, ValueError) as error:
        kind = path.suffix[1:].capitalize()
        raise SourceError(
            f"{path} is not a readable {kind} file: {error}. Write it again."
        ) from error


def _record(name: str, number: int, record: Any, where: str, kind: str = "jsonl") -> Document:
    """A line of JSON Lines, or a row; ``metadata`` values that are no strings become JSON."""
    wanted = 'Each must be like {"text": "...", "id": "...", "title": "..."}.'
    if isinstance(record, dict) and record.get("lc") == 1:  # as langchain_core.load dumps it
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
    label = f"{name}:{number}" if key is None or key == "" else sound(f"{name}#{key}")
    defaults = {"source": name, "format": kind}
    return document(label, title, text, **(defaults | metadata))


def read_cacheblend(name: str, path: Path) -> Iterator[Document | SourceError]:
    """CacheBlend's evaluation sets: every distinct passage of all questions, in order."""
    from xxhash import xxh3_64_hexdigest

    shape = 'Expected [{"ctxs": [{"title": "...", "text": "..."}], ...}]; other JSON: use .jsonl.'
    data = _json(decoded(path.read_bytes(), str(path)), str(path))
    if not isinstance(data, list):
        raise SourceError(f"{path} is not an evaluation set. {shape}")
    seen = set()
    for number, question in enumerate(data):
        passages = question.get("ctxs") if isinstance(question, dict) else None
        for passage in passages if isinstance(passages, list) else [None]:
            passage = passage if isinstance(passage, dict) else {}
            title, text = passage.get("title") or "", passage.get("text")
            if not isinstance(title, str) or not isinstance(text, str):
                yield SourceError(f"{path}: question {number} has a malformed passage. {shape}")
                continue
            label = xxh3_64_hexdigest(sound(f"{title}\n\n{text}").encode())
            if label not in seen:
                seen.add(label)
                yield document(
                    f"{name}#{label}", title, tidy(text), source=name, format="cacheblend"
                )


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} is not valid JSON: {error}. Correct or remove it.") from None
