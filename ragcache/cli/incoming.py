"""The documents that `ragcache index` reads, on their way into the store, and notes about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from ragcache.cli import render
from ragcache.cli.options import named_if_blank, note_expected_size
from ragcache.cli.output import print_note
from ragcache.cli.render.stages import FILES, ProgressReporter

if TYPE_CHECKING:
    from ragcache.core.origins import RenamedDocuments
    from ragcache.errors import SourceError
    from ragcache.rag import RagCache
    from ragcache.retriever.source import Sources
    from ragcache.types import Document

_MANY_FILES = 500  # of which the progress is shown, besides that of a portion's stages


class IncomingDocuments:
    """The documents of ``sources`` on their way into the store, and what is said about them."""

    def __init__(self, cache: RagCache, sources: Sources, reporter: ProgressReporter) -> None:
        from ragcache.core.origins import RenamedDocuments

        self.cache, self.sources, self.reporter = cache, sources, reporter
        self.renamed = RenamedDocuments(cache.indexing, sources)
        self.ids: list[str] = []
        self._files = 0  # that are read, with the one that is being read
        self._first = True
        self.after()

    def documents(self, on_error: Callable[[SourceError], None]) -> Iterator[Document]:
        found = self.sources.read(
            on_error=on_error,
            on_omitted=partial(print_note, "left out"),
            on_file=partial(setattr, self, "_files"),
        )
        for document in named_if_blank(found):
            self.ids.append(document.id)
            self.renamed.note(document)
            yield document

    def before(self, portion: list[Document]) -> None:
        """Before a portion is added: with the first, say how large all of it will be."""
        if self._first:
            self._first = False
            share = max(1, self._files) / len(self.sources.files)
            note_expected_size(self.cache, self.cache.indexing.changed(portion), share)

    def after(self) -> None:
        """After a portion is added: its files are done."""
        if len(self.sources.files) > _MANY_FILES:
            self.reporter(FILES, self._files, len(self.sources.files))


def note_renamed(renamed: RenamedDocuments) -> None:
    if renamed.same:
        before, now = next(iter(renamed.same.items()))
        print_note(
            "renamed",
            f"{len(renamed.same)} documents, because ids now begin with a folder: {before!r} is "
            f"now {now!r}",
        )
    if renamed.other:
        print_note(
            "note",
            f"{len(renamed.other)} documents, such as {renamed.other[0]!r}, have an id without a "
            "folder and a text that differs from the file of that name. Questions find them. If "
            "they are earlier versions, delete them with `ragcache delete`.",
        )


def note_other_names(others: dict[str, str]) -> None:
    if others:
        other, now = next(iter(others.items()))
        print_note(
            "note",
            f"{len(others)} of these documents are also stored under the name of another indexed "
            f"folder: {now!r}, for example, as {other!r}. Questions find both, but only the "
            "documents named first are up to date: delete the others with `ragcache delete`.",
        )


def note_deleted(lost: list[str], deleted: list[str]) -> None:
    if deleted:
        count = render.counted(len(deleted), "document")
        print_note("deleted", f"{count} whose files do not exist any more, such as {deleted[0]!r}")
    elif lost:
        print_note(
            "gone",
            f"the files of {render.counted(len(lost), 'document')}, such as {lost[0]!r}. Questions "
            "still find these documents: delete them with `ragcache delete` or --prune.",
        )
