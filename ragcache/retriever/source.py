"""Read files and folders as documents, in the formats of :mod:`ragcache.retriever.suffixes`.

``read(paths)`` yields each :class:`~ragcache.types.Document` in a fixed order, with ids that depend
only on a folder's name and a file's path in it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ragcache.errors import SourceError
from ragcache.retriever.extraction import LimitExceeded, Omitted
from ragcache.retriever.folder import files_at
from ragcache.retriever.readers import Found, clean_text
from ragcache.retriever.record_readers import NotAnEvaluationSet, read_stdin
from ragcache.retriever.suffixes import READERS
from ragcache.types import Document, invalid_id_reason
from ragcache.util.list_argument import require_list

__all__ = ["Sources", "find_files", "read"]

logger = logging.getLogger(__name__)

STDIN = Path("-")  # stands for JSON Lines from standard input

OnError = Callable[[SourceError], None]
OnOmitted = Callable[[Omitted], None]


@dataclass(frozen=True, slots=True)
class Sources:
    """The files to read, each once, and the folders that their names are relative to."""

    files: tuple[tuple[str, Path], ...]  # name and path, in reading order
    folders: Mapping[str, Path]  # by the first component of a name, the absolute path of its folder
    named: frozenset[Path]  # files that were given by themselves, not by their folder
    given: tuple[str, ...]  # prefixes of the names of files in folders that were given
    omitted: tuple[Omitted, ...]  # files in these folders that are not read

    def read(
        self,
        *,
        on_error: OnError | None = None,
        on_omitted: OnOmitted | None = None,
        on_file: Callable[[int], None] | None = None,
    ) -> Iterator[Document]:
        """As :func:`read`. ``on_file`` is called with the number of each file, from 1, before it is
        read."""
        return _read(self, on_error or _raise, on_omitted or _log, on_file or (lambda _: None))


def read(
    paths: Iterable[Path | str],
    *,
    root: Path | str | None = None,
    on_error: OnError | None = None,
    on_omitted: OnOmitted | None = None,
) -> Iterator[Document]:
    """Read files and folders in order, the files of a folder sorted by path.

    In a folder, hidden files and folders are ignored; files of unknown formats, and JSON other than
    evaluation sets, are left out and reported. A file that is named twice, for example by a link,
    is read once. The title of a document, if it has one, is put above its text. ``metadata`` has
    ``source``, ``format`` and, if known, ``title``; ``encoding`` if that was guessed.

    An id is the name of the given folder, a slash, and the path below it. For a file that was given
    itself, it is the name of its folder and its own. Relative and absolute paths of a folder give
    the same ids, and so does ``.`` inside of it. Links are not resolved. With ``root``, an id is
    the path below ``root``. A record of a JSON Lines, Arrow or Parquet file adds ``#`` and its
    ``id``, or ``:`` and its number; a passage of an evaluation set adds ``#`` and a digest of its
    text, a sheet of a workbook ``#`` and its name, and a part of a table ``:`` and the number of
    its first row, except for the first part. The path ``-`` is JSON Lines from standard input. Of a
    folder that Hugging Face's ``datasets`` has saved, the Arrow files are read. The text of a
    record is its ``text``, or ``page_content``, so that dumped LangChain documents can be read.

    Missing paths raise when ``read`` is called, before a document is read; so does a single path
    instead of a list (ConfigError). Without ``on_error``, the first :class:`SourceError` is raised.
    With it, every error is passed to it, and reading continues without the part in question:
    ``read(paths, on_error=errors.append)`` collects them. Parts of sources that are in no
    document's text are passed to ``on_omitted`` as :class:`Omitted`, or logged as warnings.
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
    files: dict[str, tuple[str, Path]] = {}  # by the path of each without links
    folders: dict[str, Path] = {}
    named: set[Path] = set()
    given: list[str] = []
    omitted: list[Omitted] = []
    for path in map(Path, require_list(paths, "paths")):
        try:
            if path == STDIN:
                files.setdefault("-", ("stdin", path))
                continue
            found = files_at(path, omitted)
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
            resolved = cache(os.path.realpath)  # of the folders: most files are no links
            for file in found:
                plain = os.path.join(resolved(file.parent), file.name)
                real = os.path.realpath(file) if file.is_symlink() else plain
                files.setdefault(real, (_name(file, above), file))
        except SourceError as error:
            report(error)
    return Sources(tuple(files.values()), folders, frozenset(named), tuple(given), tuple(omitted))


def _read(
    sources: Sources, on_error: OnError, on_omitted: OnOmitted, on_file: Callable[[int], None]
) -> Iterator[Document]:
    seen: dict[str, Path] = {}
    for omitted in sources.omitted:
        on_omitted(omitted)
    for number, (name, path) in enumerate(sources.files, 1):
        on_file(number)
        for found in _results(name, path):
            if isinstance(found, Omitted):
                on_omitted(found)
            elif isinstance(found, NotAnEvaluationSet) and path not in sources.named:
                on_omitted(Omitted(str(path), 1, 0, "files", str(found)))
            elif isinstance(found, SourceError):
                on_error(found)
            elif (why := invalid_id_reason(found.id)) is not None:
                on_error(
                    SourceError(
                        f"{str(path)!r}: {found.id[:80]!r} cannot be a document's id: {why}. "
                        "Rename it."
                    )
                )
            elif found.id in seen:
                on_error(_duplicate(found.id, seen[found.id], path))
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


def _name(file: Path, base: Path) -> str:
    """The path of a file relative to ``base``, without resolving links."""
    try:
        relative = Path(os.path.abspath(file)).relative_to(os.path.abspath(base))
    except ValueError:
        raise SourceError(f"{file} is not below root {base}. Set root above it.") from None
    return clean_text(relative.as_posix())
