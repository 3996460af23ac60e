"""Files to documents: text, Markdown, HTML, PDF, JSON Lines, Arrow, CacheBlend's evaluation files.

``read(paths)`` takes files and folders and gives :class:`~ragcache.types.Document` s in a fixed
order, with ids that depend only on where a file lies in its folder, never on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever.readers import read_html, read_markdown, read_pdf, read_text, sound
from ragcache.retriever.records import read_arrow, read_cacheblend, read_jsonl, read_stdin
from ragcache.several import several
from ragcache.types import Document, wrong_id

STDIN = Path("-")  # JSON Lines from standard input
_DATASET = "state.json", "dataset_info.json"  # of a data set that Hugging Face's datasets saved

OnError = Callable[[SourceError], None]
Reader = Callable[[str, Path], Iterator[Document | SourceError]]  # raises for a whole file

#: Reader of each file name ending.
READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".jsonl": read_jsonl,
    ".arrow": read_arrow,
    ".parquet": read_arrow,
    ".json": read_cacheblend,
}


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

    Missing paths are noticed by the call itself, before a document is read, and so is one path that
    is in no list (ConfigError). Without ``on_error``
    the first :class:`SourceError` raises. With it, every error is handed over, what it is about is
    left out, and reading goes on: ``read(paths, on_error=errors.append)`` collects them.
    """
    report = on_error or _raise
    files: dict[Path, tuple[str, Path]] = {}
    for path in map(Path, several(paths, "paths")):
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
            elif (why := wrong_id(found.id)) is not None:
                report(
                    SourceError(
                        f"{str(path)!r}: {found.id[:80]!r} cannot be a document's id: {why}. "
                        "Rename it."
                    )
                )
            elif found.id in seen:
                report(_duplicate(found.id, seen[found.id], path))
            else:
                seen[found.id] = path
                yield found


def _results(name: str, path: Path) -> Iterator[Document | SourceError]:
    reader = read_stdin if path == STDIN else READERS[path.suffix.lower()]
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


def _is_of_a_dataset(file: Path) -> bool:
    """Whether a file is one that ``datasets`` puts beside the Arrow files of a data set."""
    beside = all((file.parent / name).is_file() for name in _DATASET)
    return beside or file.name in ("dataset_dict.json", "dataset_infos.json")


def _name(file: Path, base: Path) -> str:
    try:
        relative = file.resolve().relative_to(base.resolve())
    except ValueError:
        try:  # a link that leads out of the folder is named by where it stands
            relative = file.relative_to(base)
        except ValueError:
            raise SourceError(f"{file} is not below root {base}. Set root above it.") from None
    return sound(relative.as_posix())
