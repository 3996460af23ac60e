"""Files to documents: text, Markdown, HTML, PDF, JSON Lines, Arrow, CacheBlend's evaluation files.

``read(paths)`` takes files and folders and gives :class:`~ragcache.types.Document` s in a fixed
order, with ids that depend only on the folder's name and where a file lies in it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever.extraction import LimitExceeded, Omitted
from ragcache.retriever.readers import (
    Found,
    clean_text,
    read_html,
    read_markdown,
    read_pdf,
    read_text,
)
from ragcache.retriever.record_readers import (
    NotAnEvaluationSet,
    read_arrow,
    read_cacheblend,
    read_jsonl,
    read_stdin,
)
from ragcache.types import Document, invalid_id_reason
from ragcache.util.list_argument import require_list

logger = logging.getLogger(__name__)

STDIN = Path("-")  # JSON Lines from standard input
_DATASET = "state.json", "dataset_info.json"  # of a data set that Hugging Face's datasets saved

OnError = Callable[[SourceError], None]
OnOmitted = Callable[[Omitted], None]
Reader = Callable[[str, Path], Iterator[Found]]  # raises for a whole file
_KINDS = 10  # of unknown files in a folder that are named

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


@dataclass(frozen=True, slots=True)
class Sources:
    """Files to be read, each once, and the folders that their names begin with."""

    files: tuple[tuple[str, Path], ...]  # name and path, in reading order
    folders: Mapping[str, Path]  # by the first part of names: a folder that was given, absolute
    named: frozenset[Path]  # files that were given themselves, and not by their folder
    given: tuple[str, ...]  # what names of files begin with that are in a folder that was given
    passed_over: tuple[Omitted, ...]  # of folders that were given

    def read(
        self, *, on_error: OnError | None = None, on_omitted: OnOmitted | None = None
    ) -> Iterator[Document]:
        """As :func:`read`."""
        return _read(self, on_error or _raise, on_omitted or _log)


def read(
    paths: Iterable[Path | str],
    *,
    root: Path | str | None = None,
    on_error: OnError | None = None,
    on_omitted: OnOmitted | None = None,
) -> Iterator[Document]:
    """Read files and folders, one after the other, a folder's files sorted by path.

    In a folder, hidden files and hidden folders are passed over; so are unknown formats and JSON
    that is no evaluation set, which is told. A file that is named twice, by a link say, is read
    once. The text of a document that has a title is the title, a blank line, the text.
    ``metadata`` holds ``source``, ``format`` and, where there is one, ``title``.

    An id is the name of the folder that was given, a slash, and the path below it; of a file that
    was given, the name of its folder and its own. Relative and absolute paths of a folder give the
    same ids, and so does ``.`` inside of it. Links are named by where they stand, whatever they
    lead to. With ``root``, an id is the path below that. A line of a JSON Lines file adds ``#`` and
    its ``id``, or ``:`` and its line number, and so does a row of an Arrow or Parquet file; a
    passage of an evaluation file adds ``#`` and a digest of its text. ``-`` is JSON Lines from
    standard input. A folder that ``datasets`` has saved is its Arrow files. Of a record, ``text``
    is the text, or ``page_content``, so that LangChain's documents are read as they are dumped.

    Missing paths are noticed by the call itself, before a document is read, and so is one path that
    is in no list (ConfigError). Without ``on_error``
    the first :class:`SourceError` raises. With it, every error is handed over, what it is about is
    left out, and reading goes on: ``read(paths, on_error=errors.append)`` collects them. So does
    ``on_omitted`` collect what sources hold that is in no document's text, as :class:`Omitted`;
    without it that is logged as a warning.
    """
    return find_files(paths, root=root, on_error=on_error).read(
        on_error=on_error, on_omitted=on_omitted
    )


def find_files(
    paths: Iterable[Path | str],
    *,
    root: Path | str | None = None,
    on_error: OnError | None = None,
) -> Sources:
    """The files that :func:`read` reads. Raises SourceError as that does."""
    report = on_error or _raise
    files: dict[Path, tuple[str, Path]] = {}
    folders: dict[str, Path] = {}
    named: set[Path] = set()
    given: list[str] = []
    passed_over: list[Omitted] = []
    for path in map(Path, require_list(paths, "paths")):
        try:
            if path == STDIN:
                files.setdefault(path, ("stdin", path))
                continue
            found = _files(path, passed_over)
            base = Path(os.path.abspath(path if path.is_dir() else path.parent))
            above = base.parent if root is None else Path(root)
            if path.is_dir():
                given.append(f"{_name(path, above)}/".removeprefix("./"))
            else:
                named.add(path)
            if root is None:
                first = folders.setdefault(clean_text(base.name), base)
                if not first.samefile(base):
                    raise SourceError(
                        f"{first} and {base} would both name their documents {base.name}/..., and "
                        "one would replace the other. Give their common folder instead, or set "
                        "root to it."
                    )
            for file in found:
                files.setdefault(file.resolve(), (_name(file, above), file))
        except SourceError as error:
            report(error)
    return Sources(
        tuple(files.values()), folders, frozenset(named), tuple(given), tuple(passed_over)
    )


def _read(sources: Sources, report: OnError, tell: OnOmitted) -> Iterator[Document]:
    seen: dict[str, Path] = {}
    for omitted in sources.passed_over:
        tell(omitted)
    for name, path in sources.files:
        for found in _results(name, path):
            if isinstance(found, Omitted):
                tell(found)
            elif isinstance(found, NotAnEvaluationSet) and path not in sources.named:
                tell(Omitted(str(path), 1, 0, "files", str(found)))
            elif isinstance(found, SourceError):
                report(found)
            elif (why := invalid_id_reason(found.id)) is not None:
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


def _results(name: str, path: Path) -> Iterator[Found]:
    reader = read_stdin if path == STDIN else READERS[path.suffix.lower()]
    try:
        yield from reader(name, path)
    except SourceError as error:
        yield error
    except LimitExceeded as error:
        yield SourceError(f"{path} is too much to read: {error}. Cut it into smaller files.")
    except OSError as error:
        yield SourceError(f"{path} cannot be read: {error.strerror}. Check its permissions.")


def _raise(error: SourceError) -> None:
    raise error


def _log(omitted: Omitted) -> None:
    logger.warning("%s", omitted)


def _duplicate(name: str, first: Path, second: Path) -> SourceError:
    if first == second:
        return SourceError(f"{second} holds the id {name!r} twice. Make its ids distinct.")
    return SourceError(
        f"{first} and {second} would both be document {name!r}, and one would replace the other. "
        "Give their common folder instead, or set root to it."
    )


def _files(path: Path, passed_over: list[Omitted]) -> list[Path]:
    """The readable files at ``path``, in reading order."""
    known = ", ".join(sorted(READERS))
    if not path.exists():
        raise SourceError(f"{path} does not exist. Check the path.")
    if not path.is_dir():
        if path.suffix.lower() in READERS:
            return [path]
        raise SourceError(f"{path} is of no known format: convert it to one of {known}.")
    shown = [p for p in path.rglob("*") if not any(s[0] == "." for s in p.relative_to(path).parts)]
    every = [p for p in shown if p.is_file()]
    broken = [p for p in shown if p.is_symlink() and not p.exists()]
    every = [p for p in every if p.suffix == ".arrow" or not _is_of_a_dataset(p)]
    found = sorted((p for p in every if p.suffix.lower() in READERS), key=Path.as_posix)
    unknown = Counter(p.suffix.lower() or p.name for p in every if p.suffix.lower() not in READERS)
    if unknown:
        kinds = ", ".join(f"{count} {kind}" for kind, count in unknown.most_common(_KINDS))
        more = ", ..." if len(unknown) > _KINDS else ""
        why = f"{kinds}{more}. Only {known} are read: convert what is wanted."
        passed_over.append(Omitted(str(path), unknown.total(), len(found), "files", why))
    if broken:
        why = f"links that lead to nothing, such as {broken[0]}. Mend them, or delete them."
        passed_over.append(Omitted(str(path), len(broken), len(found), "files", why))
    if not found:
        told = f" {broken[0]} is a link that leads to nothing." if broken else ""
        raise SourceError(f"{path} holds no document: no file in it is one of {known}.{told}")
    return found


def _is_of_a_dataset(file: Path) -> bool:
    """Whether a file is one that ``datasets`` puts beside the Arrow files of a data set."""
    beside = all((file.parent / name).is_file() for name in _DATASET)
    return beside or file.name in ("dataset_dict.json", "dataset_infos.json")


def _name(file: Path, base: Path) -> str:
    """The path of a file below ``base``, by where its links stand and not where they lead."""
    try:
        relative = Path(os.path.abspath(file)).relative_to(os.path.abspath(base))
    except ValueError:
        raise SourceError(f"{file} is not below root {base}. Set root above it.") from None
    return clean_text(relative.as_posix())
