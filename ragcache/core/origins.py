"""Record where a store's documents came from: their folders, deleted files, and earlier ids.

Ids of documents begin with the name of a folder (:mod:`ragcache.retriever.source`). The path of
that folder is recorded in the store, so that another folder of that name cannot replace them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ragcache.core.indexing import Indexing
from ragcache.errors import SourceError
from ragcache.retriever.source import Sources
from ragcache.store.catalog.catalog import Catalog
from ragcache.types import Document

__all__ = [
    "RenamedDocuments",
    "check_folders",
    "delete_old_names",
    "find_deleted",
    "find_other_names",
    "record_folders",
]

_FOLDER = "folder "  # setting "folder NAME" in the store: the folder's absolute path


def check_folders(catalog: Catalog, folders: Mapping[str, Path]) -> list[str]:
    """Raise SourceError if stored documents came from another folder of the same name.

    If that folder does not exist any more, it is assumed to have been moved: returns a message for
    each such folder. ``folders`` maps names to absolute paths.
    """
    moved = []
    for name, folder in folders.items():
        before = catalog.get_setting(_FOLDER + name)
        if before is None or before == str(folder):
            continue
        if not Path(before).exists():
            moved.append(
                f"{name} was indexed from {before}, which does not exist any more: it is assumed "
                f"to be {folder} now"
            )
        elif not Path(before).samefile(folder):
            raise SourceError(
                f"documents named {name}/... came from {before}, and files of the same names in "
                f"{folder} would replace them. Index a folder that contains both, or set the "
                "folder that ids are relative to with --root."
            )
    return moved


def record_folders(catalog: Catalog, folders: Mapping[str, Path]) -> None:
    """Record the absolute paths of ``folders``, by name."""
    for name, folder in folders.items():
        if catalog.get_setting(_FOLDER + name) != str(folder):
            catalog.put_setting(_FOLDER + name, str(folder))


def find_other_names(catalog: Catalog, sources: Sources) -> dict[str, str]:
    """Stored ids of these files under another folder, mapped to their ids now.

    They come from an earlier index of a folder inside or around the one that is given now, and are
    not updated with it.
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


class RenamedDocuments:
    """Stored documents with ids of an earlier release, which began below the given folder, among
    those that the documents of ``sources`` replace."""

    def __init__(self, indexing: Indexing, sources: Sources) -> None:
        self.same: dict[str, str] = {}  # earlier id -> id now, of documents that have not changed
        self.other: list[str] = []  # earlier ids whose text differs, which may be of other files
        self._indexing, self._folders = indexing, sources.folders
        self._known = {entry.id for entry in indexing.catalog.entries()}

    def note(self, document: Document) -> None:
        """To be called with every document, before it is added."""
        folder, _, before = document.id.partition("/")
        known, catalog = self._known, self._indexing.catalog
        if folder not in self._folders or before not in known or document.id in known:
            return
        if catalog.get_setting(_FOLDER + before.partition("/")[0]) is not None:
            return  # the id begins with a recorded folder
        source = document.metadata["source"].removeprefix(f"{folder}/")
        old = replace(document, id=before, metadata=dict(document.metadata) | {"source": source})
        if catalog.document_digest(before) == self._indexing.digest(old):
            self.same[before] = document.id
        else:
            self.other.append(before)


def delete_old_names(indexing: Indexing, found: RenamedDocuments) -> None:
    """Delete documents under their earlier ids, after they were stored under the new ones, which
    inherit expiry and pin."""
    for before, now in found.same.items():
        entry = indexing.catalog.entry(before)
        if entry is not None:
            indexing.catalog.set_retention(now, expires=entry.expires, pinned=entry.pinned or None)
            indexing.catalog.delete_document(before)


def find_deleted(catalog: Catalog, sources: Sources, read: Iterable[str]) -> list[str]:
    """Ids of stored documents from these sources that were not among the documents ``read`` now.

    Documents of a file that exists but of which nothing could be read are not included.
    """
    present = set(read)
    names = {name for name, _ in sources.files}
    unread = names - {name for id in present for name in _files(id, names)}
    return [
        entry.id
        for entry in catalog.entries()
        if entry.id not in present
        and (entry.id.startswith(sources.given) or any(_files(entry.id, names)))
        and not any(_files(entry.id, unread))
    ]


def _files(id: str, names: set[str]) -> Iterator[str]:
    """Files among ``names`` that a document with this id may come from: a file of that name, or
    one of which it is a record (``file#record``, ``file:record``)."""
    ends = [at for at, sign in enumerate(id) if sign in "#:"] + [len(id)]
    return (id[:end] for end in ends if id[:end] in names)
