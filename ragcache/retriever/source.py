"""Files to documents: text, Markdown, HTML, PDF, JSON Lines and CacheBlend's evaluation files.

``read(paths)`` takes files and folders and gives :class:`~ragcache.types.Document` s in a fixed
order, with ids that depend only on where a file lies in its folder, never on the machine.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ragcache.errors import SourceError
from ragcache.retriever.formats import html_text, markdown_text, pdf_text, tidy
from ragcache.types import Document

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
    and its line number; a passage of an evaluation file adds ``#`` and a digest of its text.

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
    try:
        yield from READERS[path.suffix.lower()](name, path)
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
    if not path.exists():
        raise SourceError(f"{path} does not exist. Check the path.")
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file()]
        found = [p for p in found if not any(s[0] == "." for s in p.relative_to(path).parts)]
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


def _read_jsonl(name: str, path: Path) -> Iterator[Document | SourceError]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                if line := _decode(raw, f"{path}:{number}").strip():
                    yield _record(name, number, _json(line, f"{path}:{number}"), path)
            except SourceError as error:
                yield error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} is not valid JSON: {error}. Correct or remove it.") from None


def _record(name: str, number: int, record: Any, path: Path) -> Document:
    """One line of a JSON Lines file; ``metadata`` values that are no strings become JSON."""
    wanted = 'Each line must be an object like {"text": "...", "id": "...", "title": "..."}.'
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise SourceError(f'{path}:{number} has no string "text". {wanted}')
    key, title = record.get("id"), record.get("title") or ""
    if isinstance(key, bool) or not isinstance(key, str | int | None) or not isinstance(title, str):
        raise SourceError(f'{path}:{number}: "id" or "title" is not a string. {wanted}')
    extra = record.get("metadata") or {}
    if not isinstance(extra, dict):
        raise SourceError(f'{path}:{number}: "metadata" is not an object. Write {{"key": "..."}}.')
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in extra.items()}
    label = f"{name}:{number}" if key is None or key == "" else _sound(f"{name}#{key}")
    defaults = {"source": name, "format": "jsonl"}
    return _document(label, title, record["text"], **(defaults | metadata))


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
    ".json": _read_cacheblend,
}
