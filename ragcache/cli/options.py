"""What several commands have in common: options, the two consoles, and opening a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ragcache.errors import StoreError
from ragcache.models import TINY
from ragcache.settings import Settings

if TYPE_CHECKING:
    from ragcache.types import Document

# Names, questions and messages have brackets of their own: they are no markup.
out, err = Console(markup=False), Console(stderr=True, markup=False)

Store = Annotated[Path | None, typer.Option(help="Folder of the store.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(help="Model folder or hub name; default: the store's own, or `tiny`."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]


def _ratio(text: str) -> str | float:
    """A number where it is one; the settings say what may be."""
    try:
        return float(text)
    except ValueError:
        return text


Ratio = Annotated[
    Any | None,
    typer.Option(
        parser=_ratio,
        metavar="SHARE|auto",
        help="Share of chunk tokens to recompute, 0 to 1; auto suits the machine.",
    ),
]
Compile = Annotated[
    str | None,
    typer.Option("--compile", help="Compute chunks behind: prefix, bos, link0 or enriched(n)."),
]
Remote = Annotated[
    str | None,
    typer.Option(help="Object store that machines share: s3://bucket/prefix or file:///folder."),
]
Levels = Annotated[
    str | None,
    typer.Option(help="Codecs that chunks go there in too, such as int8,cachegen."),
]
Codec = Annotated[str | None, typer.Option(help="How KV is stored, such as raw, int8 or cachegen.")]


def tell(label: str, text: object, style: str = "yellow") -> None:
    """A message about the work, beside its results: on stderr, on a line of its own."""
    err.print(Text.assemble((f"{label}:", style), f" {text}"), soft_wrap=True)


def named_if_blank(documents: Iterable[Document]) -> Iterator[Document]:
    """The same, with a word about each that has no text, a blank file say: it makes no chunk."""
    for document in documents:
        if not document.text.strip():  # a scanned PDF is an error
            tell("no text", f"{document.id}: it makes no chunk, so no question will find it")
        yield document


def check_exists(store: Path) -> None:
    """Raise StoreError where there is none."""
    if not store.exists():
        raise StoreError(
            f"there is no store in {store}. Make one: ragcache index PATH... --store {store}"
        )


def check_free(store: Path) -> None:
    """Raise LockedError, before anything is loaded or read, where another process writes it."""
    from ragcache.store.directory import check_free

    check_free(store)


def opened(settings: Settings, *, must_exist: bool = False, lazy: bool = False) -> Any:
    """A RagCache, to be closed by its ``with``; ``lazy`` as for :meth:`RagCache.open`."""
    if must_exist or lazy:
        check_exists(settings.store)
    if not lazy:
        check_free(settings.store)
    from ragcache.pipeline import RagCache

    cache = RagCache.open(settings.store, settings=settings, lazy=lazy)
    if cache.engine.name == TINY:
        tell(
            "note",
            "this is the small model that ships: it knows only its own made-up world. Index with "
            "--model for answers from documents of yours.",
        )
    return cache
