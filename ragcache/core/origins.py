"""Where a store's documents came from: folders, files that are gone, and names of before.

Ids of files begin with the name of their folder (:mod:`ragcache.retriever.source`). Which folder
that was is recorded beside the documents, so that another one of that name cannot replace them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ragcache.core.indexing import Indexing
from ragcache.errors import SourceError
from ragcache.retriever.source import Sources
from ragcache.store.catalog.catalog import Catalog
from ragcache.types import Document

_FOLDER = "folder "  # and its name: the absolute path that was given


def check_folders(catalog: Catalog, folders: Mapping[str, Path]) -> list[str]:
    """Raise SourceError where documents came from another folder of a name that is still there; the
    names of those that are not: they are taken to have moved."""
    moved = []
    for name, folder in folders.items():
        before = catalog.get_setting(_FOLDER + name)
        if before is None or before == str(folder):
            continue
        if not Path(before).exists():
            moved.append(
                f"{name} was indexed from {before}, which is gone: taken to be {folder} now"
            )
        elif not Path(before).samefile(folder):
            raise SourceError(
                f"documents named {name}/... came from {before}, and those of {folder} would "
                "replace them where their files have the same names. Index the common folder "
                "instead, or name them by another one with --root."
            )
    return moved


def record_folders(catalog: Catalog, folders: Mapping[str, Path]) -> None:
    """From now on these are the folders that names begin with."""
    for name, folder in folders.items():
        if catalog.get_setting(_FOLDER + name) != str(folder):
            catalog.put_setting(_FOLDER + name, str(folder))


def otherwise_named(catalog: Catalog, sources: Sources) -> dict[str, str]:
    """Ids of stored documents that are from these files under other names, and the names now.

    They were named by a folder inside of the one that is given now, or around it: indexing the one
    leaves those of the other as they were.
    """
    recorded = catalog.settings(_FOLDER)
    here = {name: Path(os.path.abspath(path)) for name, path in sources.files}
    others: dict[str, str] = {}
    for setting, text in recorded.items():
        folder = Path(text)
        for name, path in here.items():
            if path.is_relative_to(folder):
                other = f"{setting.removeprefix(_FOLDER)}/{path.relative_to(folder).as_posix()}"
                others |= {other: name} if other != name else {}
    found = {}
    names = set(others) - set(here)
    for entry in catalog.entries() if names else ():
        for other in _files(entry.id, names):
            found[entry.id] = others[other] + entry.id.removeprefix(other)
    return found


@dataclass(frozen=True, slots=True)
class Renamed:
    """Documents that are stored under names of before, without their folder."""

    same: dict[str, str]  # ids of before, and now, where nothing else has changed
    other: list[str]  # ids of before that may be of these files or of another folder's


def renamed(indexing: Indexing, sources: Sources, documents: Iterable[Document]) -> Renamed:
    """What earlier versions named by the path below the folder that was given."""
    same: dict[str, str] = {}
    other: list[str] = []
    known = {entry.id for entry in indexing.catalog.entries()}
    for document in documents:
        folder, _, before = document.id.partition("/")
        if folder not in sources.folders or before not in known or document.id in known:
            continue
        if indexing.catalog.get_setting(_FOLDER + before.partition("/")[0]) is not None:
            continue  # a folder's own name
        source = document.metadata["source"].removeprefix(f"{folder}/")
        old = replace(document, id=before, metadata=dict(document.metadata) | {"source": source})
        if indexing.catalog.document_digest(before) == indexing.digest(old):
            same[before] = document.id
        else:
            other.append(before)
    return Renamed(same, other)


def rename(indexing: Indexing, found: Renamed) -> None:
    """Delete documents under their names of before, now that they are stored under the new ones,
    which are kept as long, and pinned, as those were."""
    for before, now in found.same.items():
        entry = indexing.catalog.entry(before)
        if entry is not None:
            indexing.catalog.set_retention(now, expires=entry.expires, pinned=entry.pinned or None)
            indexing.catalog.delete_document(before)


def gone(catalog: Catalog, sources: Sources, read: Iterable[str]) -> list[str]:
    """Ids of stored documents that came from what was read now, and are no longer there.

    Documents of a file that is there, and of which nothing was read, are not gone.
    """
    there = set(read)
    names = {name for name, _ in sources.files}
    unread = names - {name for id in there for name in _files(id, names)}
    return [
        entry.id
        for entry in catalog.entries()
        if entry.id not in there
        and (entry.id.startswith(sources.given) or any(_files(entry.id, names)))
        and not any(_files(entry.id, unread))
    ]


def _files(id: str, names: set[str]) -> Iterator[str]:
    """Those of ``names`` that a document of this id may be from: its own, or one that it is a
    record of."""
    ends = [at for at, sign in enumerate(id) if sign in "#:"] + [len(id)]
    return (id[:end] for end in ends if id[:end] in names)
