"""Options that several commands share, and opening a store."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ragcache.cli import render
from ragcache.cli.output import loading, print_note
from ragcache.errors import ConfigError, StoreError
from ragcache.models import TINY
from ragcache.settings import Settings
from ragcache.types import Sampling

if TYPE_CHECKING:
    from ragcache.rag import RagCache
    from ragcache.retriever.metadata import Filter
    from ragcache.types import Document

NO_CHUNKS = 4  # exit code: there were no chunks to answer from

Store = Annotated[Path | None, typer.Option(help="Folder of the store.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or GGUF file of the model, its name on a model hub, `tiny` or `smollm2`; "
        "default: the store's own, or `tiny`."
    ),
]
Tenant = Annotated[
    str | None,
    typer.Option(help="Tenant whose store in this folder is used: a name in the keys of `serve`."),
]
Device = Annotated[str | None, typer.Option(help="Device of the model: auto, cpu or cuda.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Data type of the model: auto, float32, bfloat16 or float16."),
]


Ratio = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|auto",
        help="Share of chunk tokens to recompute, 0 to 1; auto: chosen by measured speeds.",
    ),
]
EncodingContext = Annotated[
    str | None,
    typer.Option(
        help="Tokens that precede a chunk while its KV is computed: prose, prefix, bos or link0."
    ),
]
Remote = Annotated[
    str | None,
    typer.Option(
        help="Object store that machines share, such as s3://bucket/prefix or file:///folder."
    ),
]
RemoteCodecs = Annotated[
    str | None,
    typer.Option(help="Further codecs in which the remote has chunks, such as int8,cachegen."),
]
PromptDate = Annotated[
    str | None,
    typer.Option(
        metavar="today|YYYY-MM-DD",
        help="Change the date that the chat template puts into this store's prompts.",
    ),
]
Retrieval = Annotated[
    str | None,
    typer.Option(help="What chunks are found by: dense (vectors), bm25 (words) or hybrid (both)."),
]
Reranker = Annotated[
    str | None,
    typer.Option(help="Cross-encoder that puts chunks in a better order: its name or folder."),
]
RequireChunks = Annotated[
    bool | None,
    typer.Option(
        "--require-chunks/--allow-no-chunks",
        help="Refuse questions for which no chunks are found, with exit code 4.",
    ),
]
Codec = Annotated[
    str | None, typer.Option(help="Codec of stored KV, such as bfloat16, int8, cachegen or kvtc16.")
]


def parse_filter(given: str | None) -> Filter | None:
    """The filter of ``--filter``. Raises ConfigError for anything that is not one."""
    if given is None:
        return None
    from ragcache.retriever.metadata import MetadataFilter

    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--filter is not JSON ({error}): write an object, such as "
            """--filter '{"language": "en"}'"""
        ) from error
    MetadataFilter.of(found)
    return cast("Filter", found)


def read_schema(path: Path) -> str:
    """The JSON schema in a file. Raises ConfigError for anything that is not one."""
    try:
        text = path.read_text(encoding="utf-8")
        return Sampling(json_schema=text).schema_text or ""
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Give the path of a file with the schema."
        ) from error
    except ValueError as error:
        raise ConfigError(f"the schema in {path} cannot be used: correct it. {error}") from error


def named_if_blank(documents: Iterable[Document]) -> Iterator[Document]:
    """``documents``, with a note about each that has no text, such as a blank file, and at the end
    one about those whose encoding was guessed."""
    guessed, first = 0, ""
    for document in documents:
        if not document.text.strip():  # a scanned PDF is an error
            print_note("no text", f"{document.id}: it has no chunks, so no question will find it")
        if encoding := document.metadata.get("encoding"):
            guessed += 1
            first = first or f"{document.id} as {encoding}"
        yield document
    if guessed:
        print_note(
            "guessed",
            f"the encoding of {render.counted(guessed, 'document')}, such as {first}. If their "
            "text is wrong, convert the files to UTF-8, for instance with `iconv`.",
        )


def note_prompt_date(cache: RagCache) -> None:
    """Say which date the prompts of this store keep, if they have one."""
    if day := cache.template.day:
        print_note(
            "note",
            f"the chat template puts a date into the prompt: this store keeps {day}. "
            "--prompt-date today changes it, and then all KV is computed again.",
        )


def note_expected_size(cache: RagCache, documents: Sequence[Document], share: float = 1.0) -> None:
    """Say about how many bytes the KV of ``documents``, which are a ``share`` of those that come,
    will take, before it is computed."""
    from ragcache.core.precompute import bytes_per_token

    characters = sum(len(document.text) for document in documents)
    if not characters:
        return
    sample = [d.text[:_SAMPLED] for d in documents[:: 1 + len(documents) // 32]]
    tokens = sum(len(cache.engine.tokenize(text)) for text in sample)
    tokens = round(tokens * characters / max(1, sum(map(len, sample))) / share)
    own = dict(cache.engine.fingerprint.fields)["codec"]
    each = bytes_per_token(cache.engine)
    said = (
        f"the KV of about {tokens:,} tokens will take about {render.size(round(tokens * each))}: "
        f"{render.size(round(each))} per token, codec {own}"
    )
    if share < 1:
        said += ", if all files are like the first"
    print_note("note", said + smaller(cache))


def smaller(cache: RagCache) -> str:
    """For a store without KV, the size with a smaller codec; else an empty text."""
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
    """Raise StoreError if there is no such store, or it has none of that tenant."""
    from ragcache.store.tenants import tenant_folder  # torch comes with it

    folder = tenant_folder(store, tenant or "")
    if not folder.exists():
        whose = f" --tenant {tenant}" if tenant else ""
        raise StoreError(
            f"there is no store in {folder}. Make one: "
            f"ragcache index PATH... --store {store}{whose}"
        )


def check_free(store: Path) -> None:
    """Raise LockedError if another process writes the store. Loads and reads nothing."""
    from ragcache.store.lmdb.directory import check_writer_lock

    check_writer_lock(store)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which takes a sixth of the start and finds nothing to free."""
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
    lazy: bool = False,
    tenant: str | None = None,
) -> Iterator[RagCache]:
    """The RagCache of the store, or of a tenant's store in its folder, with its model; ``lazy`` as
    for :meth:`RagCache.open`."""
    from ragcache.store.tenants import make_tenant_folder, tenant_folder

    path = tenant_folder(settings.store, tenant or "")
    if lazy:
        check_exists(settings.store, tenant)
    if not lazy:
        check_free(settings.store)
    with _uncollected():
        from ragcache.rag import RagCache

        opening = RagCache.open(settings.store, settings=settings, loading=loading, lazy=lazy)
    with opening as own:
        _note_tiny_model(own)
        if not tenant:
            yield own
            return
        make_tenant_folder(settings.store, tenant)
        with RagCache.open(path, settings=settings, beside=own, tenant=tenant, lazy=lazy) as cache:
            yield cache


def _note_tiny_model(cache: RagCache) -> None:
    if cache.engine.name == TINY:
        print_note(
            "note",
            "this is the small model that comes with ragcache: it knows only its own made-up "
            "world. Index with --model to get answers from your own documents.",
        )
