"""What several commands have in common: options, and opening a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragcache.cli.output import err as err
from ragcache.cli.output import figures as figures
from ragcache.cli.output import out as out
from ragcache.cli.output import progress as progress
from ragcache.cli.output import tell as tell
from ragcache.cli.output import waiting as waiting
from ragcache.errors import StoreError
from ragcache.models import TINY
from ragcache.settings import Settings

if TYPE_CHECKING:
    from ragcache.types import Document

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


def opened(settings: Settings, *, must_exist: bool = False) -> Any:
    """A RagCache, to be closed by its ``with``."""
    from ragcache.pipeline import RagCache

    if must_exist:
        check_exists(settings.store)
    what = f"the model {settings.model}" if settings.model else "the store's model"
    with waiting(f"loading {what}"):
        cache = RagCache.open(settings.store, settings=settings)
    if cache.engine.name == TINY:
        tell(
            "note",
            "this is the small model that ships: it knows only its own made-up world. Index with "
            "--model for answers from documents of yours.",
        )
    return cache
