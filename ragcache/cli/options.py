"""What several commands have in common: options, and opening a store."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragcache.cli import render
from ragcache.cli.output import err as err
from ragcache.cli.output import figures as figures
from ragcache.cli.output import loading as loading
from ragcache.cli.output import out as out
from ragcache.cli.output import progress as progress
from ragcache.cli.output import tell as tell
from ragcache.cli.output import waiting as waiting
from ragcache.errors import StoreError
from ragcache.models import TINY
from ragcache.settings import Settings

if TYPE_CHECKING:
    from ragcache.rag import RagCache
    from ragcache.types import Document

NO_CHUNKS = 4  # exit code: there was nothing to answer from

Store = Annotated[Path | None, typer.Option(help="Folder of the store.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(help="Model folder or hub name; default: the store's own, or `tiny`."),
]
Tenant = Annotated[
    str | None,
    typer.Option(help="Whose store, below that folder: a name among the keys of `serve`."),
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
    typer.Option("--compile", help="Context to compute chunks in: prefix, bos or link0."),
]
Remote = Annotated[
    str | None,
    typer.Option(help="Object store that machines share: s3://bucket/prefix or file:///folder."),
]
Levels = Annotated[
    str | None,
    typer.Option(help="Codecs that chunks go there in too, such as int8,cachegen."),
]
PromptDate = Annotated[
    str | None,
    typer.Option(
        metavar="today|YYYY-MM-DD",
        help="Set anew the date that a chat template puts into this store's prompts.",
    ),
]
RequireChunks = Annotated[
    bool | None,
    typer.Option(
        "--require-chunks/--allow-no-chunks",
        help="Refuse a question that nothing is found for, with exit code 4.",
    ),
]
Codec = Annotated[
    str | None, typer.Option(help="How KV is stored, such as raw, bfloat16, int8 or cachegen.")
]


def named_if_blank(documents: Iterable[Document]) -> Iterator[Document]:
    """The same, with a word about each that has no text, a blank file say: it makes no chunk."""
    for document in documents:
        if not document.text.strip():  # a scanned PDF is an error
            tell("no text", f"{document.id}: it makes no chunk, so no question will find it")
        yield document


def tell_date(cache: RagCache) -> None:
    """That a store keeps its date, where its prompts have one."""
    if day := cache.template.day:
        tell(
            "note",
            f"the chat template puts a date into the prompt: {day} is kept for this store. "
            "--prompt-date today sets it anew, and all KV is computed again.",
        )


def tell_size(cache: RagCache, documents: Sequence[Document]) -> None:
    """About how many bytes the KV of documents will take, before it is computed."""
    from ragcache.core.precompute import bytes_per_token

    characters = sum(len(document.text) for document in documents)
    if not characters:
        return
    sample = [d.text[:_SAMPLED] for d in documents[:: 1 + len(documents) // 32]]
    tokens = sum(len(cache.engine.tokenize(text)) for text in sample)
    tokens = round(tokens * characters / max(1, sum(map(len, sample))))
    own = dict(cache.engine.fingerprint.fields)["codec"]
    each = bytes_per_token(cache.engine)
    said = (
        f"the KV of {tokens:,} tokens or so will take about {render.size(round(tokens * each))}: "
        f"{render.size(round(each))} per token, codec {own}"
    )
    tell("note", said + smaller(cache))


def smaller(cache: RagCache) -> str:
    """For a store that has no KV yet, what a codec of fewer bytes would take; else nothing."""
    from ragcache.core.precompute import bytes_per_token
    from ragcache.store.format.codecs import codec

    engine = cache.engine
    own = dict(engine.fingerprint.fields)["codec"]
    if not codec(own).faithful or cache.store.stats().chunks:
        return ""
    share = bytes_per_token(engine, "int8") / bytes_per_token(engine)
    return f"; --codec int8 takes {share:.0%} of that"


_SAMPLED = 4000  # characters of a document


def check_exists(store: Path, tenant: str | None = None) -> None:
    """Raise StoreError where there is none, or none of that tenant's below it."""
    from ragcache.store.tenants import tenant_folder  # torch comes with it

    folder = tenant_folder(store, tenant or "")
    if not folder.exists():
        whose = f" --tenant {tenant}" if tenant else ""
        raise StoreError(
            f"there is no store in {folder}. Make one: "
            f"ragcache index PATH... --store {store}{whose}"
        )


def check_free(store: Path) -> None:
    """Raise LockedError, before anything is loaded or read, where another process writes it."""
    from ragcache.store.lmdb.directory import check_free

    check_free(store)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage, which takes a sixth of the time to start and finds none: what is
    imported and loaded stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def opened(
    settings: Settings,
    *,
    must_exist: bool = False,
    lazy: bool = False,
    tenant: str | None = None,
) -> Iterator[Any]:
    """The RagCache of the store, or of a tenant's below it, with its model; ``lazy`` as for
    :meth:`RagCache.open`."""
    from ragcache.store.tenants import made_tenant_folder, tenant_folder

    path = tenant_folder(settings.store, tenant or "")
    if must_exist or lazy:
        check_exists(settings.store, tenant)
    if not lazy:
        check_free(settings.store)
    with _uncollected():
        from ragcache.rag import RagCache

        opening = RagCache.open(settings.store, settings=settings, loading=loading, lazy=lazy)
    with opening as own:
        _tell_of_tiny(own)
        if not tenant:
            yield own
            return
        made_tenant_folder(settings.store, tenant)
        with RagCache.open(path, settings=settings, beside=own, tenant=tenant, lazy=lazy) as cache:
            yield cache


def _tell_of_tiny(cache: RagCache) -> None:
    if cache.engine.name == TINY:
        tell(
            "note",
            "this is the small model that ships: it knows only its own made-up world. Index with "
            "--model for answers from documents of yours.",
        )
