"""Files to documents: text, Markdown, HTML, PDF, JSON Lines, Arrow, CacheBlend's evaluation files.

``read(paths)`` takes files and folders and gives :class:`~ragcache.types.Document` s in a fixed
order, with ids that depend only on where a file lies in its folder, never on the machine.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ragcache.errors import SourceError
from ragcache.retriever.formats import html_text, markdown_text, pdf_text, tidy
from ragcache.types import Document

STDIN = Path("-")  # JSON Lines from standard input
_DATASET = "state.json", "dataset_info.json"  # of a data set that Hugging Face's datasets saved

OnError = Callable[[SourceError], None]
Reader = Callable[[str, Path], Iterator[Document | SourceError]]  # raises for a whole file


def read(
    paths: Iterable[Path | str],
    *,
    root: Path | str | None = None,
    on_error: OnError | None = None,
) -> Iterator[Document]:
    """Read files and folders, one after the other, a folder's files sorted by path.

    In a folder, hidden files, hidden folders and unknown formats are passed over; a file that is
    named twice is read once. The text of a document that has a title is the title, a blank line,
    the text. ``metadata`` holds ``source``, ``format`` and, where there is one, ``title``.

    An id is the path below ``root``; without ``root``, below the folder that was given, or the
    name of a file that was given. A line of a JSON Lines file adds ``#`` and its ``id``, or ``:``
    and its line number, and so does a row of an Arrow or Parquet file; a passage of an evaluation
    file adds ``#`` and a digest of its text. ``-`` is JSON Lines from standard input. A folder that
    ``datasets`` has saved is its Arrow files. Of a record, ``text`` is the text, or
    ``page_content``, so that LangChain's documents are read as they are dumped.

    Missing paths are noticed by the call itself, before a document is read. Without ``on_error``
    the first :class:`SourceError` raises. With it, every error is handed over, what it is about is
    left out, and reading goes on: ``read(paths, on_error=errors.append)`` collects them.
    """
    report = on_error or _raise
    files: dict[Path, tuple[str, Path]] = {}
    for path in map(Path, paths):
        try:
            for name, file in _files(path, None if root is None else Path(root)):
                files.setdefault(file.resolve(), (name, file))
        except SourceError as error:
            report(error)
    return _read(list(files.values()), report)


def _read(files: list[tuple[str, Path]], report: OnError) -> Iterator[Document]:
    seen: dict[str, Path] = {}
    for name, path in files:
        for found in _results(name, path):
            if isinstance(found, SourceError):
                report(found)
            elif found.id in seen:
                report(_duplicate(found.id, seen[found.id], path))
            else:
                seen[found.id] = path
                yield found


def _results(name: str, path: Path) -> Iterator[Document | SourceError]:
    reader = _read_stdin if path == STDIN else READERS[path.suffix.lower()]
    try:
        yield from reader(name, path)
    except SourceError as error:
        yield error
    except OSError as error:
        yield SourceError(f"{path} cannot be read: {error.strerror}. Check its permissions.")


def _raise(error: SourceError) -> None:
    raise error


def _duplicate(name: str, first: Path, second: Path) -> SourceError:
    if first == second:
        return SourceError(f"{second} holds the id {name!r} twice. Make its ids distinct.")
    return SourceError(
        f"{first} and {second} would both be document {name!r}, and one would replace the other. "
        "Give their common folder instead, or set root to it."
    )


def _files(path: Path, root: Path | None) -> list[tuple[str, Path]]:
    """The readable files at ``path`` with their names, in reading order."""
    known = ", ".join(sorted(READERS))
    if path == STDIN:
        return [("stdin", path)]
    if not path.exists():
        raise SourceError(f"{path} does not exist. Check the path.")
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file()]
        found = [p for p in found if not any(s[0] == "." for s in p.relative_to(path).parts)]
        found = [p for p in found if p.suffix == ".arrow" or not _is_of_a_dataset(p)]
        if not found:
            raise SourceError(f"{path} holds no document: no file in it is one of {known}.")
        found.sort(key=Path.as_posix)
    elif path.suffix.lower() in READERS:
        found = [path]
    else:
        raise SourceError(f"{path} is of no known format: convert it to one of {known}.")
    base = root or (path if path.is_dir() else path.parent)
    return [(_name(file, base), file) for file in found]


def _name(file: Path, base: Path) -> str:
    try:
        relative = file.resolve().relative_to(base.resolve())
    except ValueError:
        try:  # a link that leads out of the folder is named by where it stands
            relative = file.relative_to(base)
        except ValueError:
            raise SourceError(f"{file} is not below root {base}. Set root above it.") from None
    return _sound(relative.as_posix())


def _sound(text: str) -> str:
    """Text that every tokenizer takes: newlines as ``\\n``, no NUL, no half of a surrogate pair."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{place} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}). "
            "Convert it, for instance with `iconv -f WINDOWS-1252 -t UTF-8`."
        ) from None


def _document(name: str, title: str, text: str, **metadata: str) -> Document:
    title, text = _sound(title).strip(), _sound(text)
    if title:
        metadata["title"] = title
        if text.lstrip("# ").split("\n", 1)[0].strip() != title:
            text = f"{title}\n\n{text}"
    return Document(name, text, metadata)


def _read_text(name: str, path: Path) -> Iterator[Document]:
    yield _document(name, "", _decode(path.read_bytes(), str(path)), source=name, format="text")


def _read_markdown(name: str, path: Path) -> Iterator[Document]:
    title, text = markdown_text(_sound(_decode(path.read_bytes(), str(path))))
    metadata = {"source": name, "format": "markdown"} | ({"title": title} if title else {})
    yield Document(name, text, metadata)  # its title is one of its headings: not said twice


def _read_html(name: str, path: Path) -> Iterator[Document]:
    title, text = html_text(_sound(_decode(path.read_bytes(), str(path))))
    yield _document(name, title, text, source=name, format="html")


def _read_pdf(name: str, path: Path) -> Iterator[Document]:
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
    metadata = {"source": name, "format": "pdf"} | ({"title": _sound(title)} if title else {})
    yield Document(name, _sound(text), metadata)


def _is_of_a_dataset(file: Path) -> bool:
    """Whether a file is one that ``datasets`` puts beside the Arrow files of a data set."""
    beside = all((file.parent / name).is_file() for name in _DATASET)
    return beside or file.name in ("dataset_dict.json", "dataset_infos.json")


def _read_jsonl(name: str, path: Path) -> Iterator[Document | SourceError]:
    with path.open("rb") as lines:
        yield from _records(name, lines, str(path))


def _read_stdin(name: str, path: Path) -> Iterator[Document | SourceError]:
    yield from _records(name, sys.stdin.buffer, "standard input")


def _records(name: str, lines: Iterable[bytes], place: str) -> Iterator[Document | SourceError]:
    for number, raw in enumerate(lines, start=1):
        where = f"{place}:{number}"
        try:
            if line := _decode(raw, where).strip():
                yield _record(name, number, _json(line, where), where)
        except SourceError as error:
            yield error


def _read_arrow(name: str, path: Path) -> Iterator[Document | SourceError]:
    """Rows of an Arrow stream, which ``datasets`` writes, an Arrow file, or a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise SourceError(
            f'{path} needs pyarrow, which is not installed. Run `pip install "ragcache[arrow]"`.'
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


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} is not valid JSON: {error}. Correct or remove it.") from None


#: Of a record, what is read; all else in it is passed over.
_FIELDS = {"text", "page_content", "id", "title", "metadata"}


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
    label = f"{name}:{number}" if key is None or key == "" else _sound(f"{name}#{key}")
    defaults = {"source": name, "format": kind}
    return _document(label, title, text, **(defaults | metadata))


def _read_cacheblend(name: str, path: Path) -> Iterator[Document | SourceError]:
    """CacheBlend's evaluation sets: every distinct passage of all questions, in order."""
    from xxhash import xxh3_64_hexdigest

    shape = 'Expected [{"ctxs": [{"title": "...", "text": "..."}], ...}]; other JSON: use .jsonl.'
    data = _json(_decode(path.read_bytes(), str(path)), str(path))
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
            label = xxh3_64_hexdigest(_sound(f"{title}\n\n{text}").encode())
            if label not in seen:
                seen.add(label)
                yield _document(
                    f"{name}#{label}", title, tidy(text), source=name, format="cacheblend"
                )


#: Reader of each file name ending.
READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".jsonl": _read_jsonl,
    ".arrow": _read_arrow,
    ".parquet": _read_arrow,
    ".json": _read_cacheblend,
}
