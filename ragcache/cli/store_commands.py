"""Commands for stores and their remotes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragcache.cli import render
from ragcache.cli.options import (
    Codec,
    Model,
    Remote,
    RemoteCodecs,
    Store,
    Tenant,
    check_exists,
    opened,
)
from ragcache.cli.output import figures, loading, out, print_note, progress, waiting
from ragcache.cli.render.stores import (
    built_for,
    document_table,
    finding_table,
    index_text,
    store_table,
    transfer_text,
)
from ragcache.errors import ConfigError, StoreError
from ragcache.settings import Settings

if TYPE_CHECKING:
    from ragcache.store import DiskStore
    from ragcache.store.disk.recode import Recoded
    from ragcache.store.remote.store import RemoteStore


def documents(store: Store = None, tenant: Tenant = None) -> None:
    """List the documents of a store."""
    from ragcache.store import Catalog

    with _store(store, readonly=True, tenant=tenant) as chunks:
        entries = Catalog(chunks).entries()
    out.print(document_table(entries) if entries else "no documents", highlight=False)
    figures({"documents": [{**asdict(one), "metadata": dict(one.metadata)} for one in entries]})


def delete(
    ids: Annotated[
        list[str], typer.Argument(help="Ids of documents, as `ragcache documents` lists them.")
    ],
    store: Store = None,
    tenant: Tenant = None,
    remote: Remote = None,
) -> None:
    """Delete documents, their chunks, and KV that no other document uses, also in the remote."""
    from ragcache.store import Catalog

    has_remote = Settings.load(remote=remote).remote
    with _shared(store, remote, tenant) if has_remote else _store(store, tenant=tenant) as chunks:
        catalog = Catalog(chunks)
        missing = [name for name in ids if not catalog.delete_document(name)]
        known = [entry.id for entry in catalog.entries()] if missing else []
    out.print(f"{render.counted(len(ids) - len(missing), 'document')} deleted", highlight=False)
    deleted = [name for name in ids if name not in missing]
    figures({"deleted": deleted, "missing": missing})
    if missing:
        parts = [name for name in known if name.startswith((f"{missing[0]}#", f"{missing[0]}:"))]
        more = f"; that file has documents such as {parts[0]!r}" if parts else ""
        raise StoreError(
            f"there is no document {', '.join(map(repr, missing))}: `ragcache documents` lists "
            f"them{more}"
        )


def stats(store: Store = None, tenant: Tenant = None, remote: Remote = None) -> None:
    """Show what a store holds, and the size of its remote."""
    from ragcache.retriever.index_description import describe_index
    from ragcache.setup import PROMPT_DATE
    from ragcache.store import Catalog

    with _store(store, readonly=True, tenant=tenant) as chunks:
        catalog = Catalog(chunks)
        documents, held, waits = len(catalog.entries()), chunks.stats(), chunks.pending_writes
        day = catalog.get_setting(PROMPT_DATE)
        index = describe_index(chunks.tables.path / "vectors.index")
        out.print(store_table(held, documents, waits))
        if index is not None:
            out.print(index_text(index), highlight=False)
        if day:
            out.print(f"date in the prompt: {day}", highlight=False)
    there = None
    if url := Settings.load(remote=remote).remote:
        from ragcache.store.remote.chunk_objects import ChunkObjects
        from ragcache.store.remote.object_store import Bucket

        sizes = [size for _, size in ChunkObjects(Bucket(url)).names()]
        out.print(f"{url}: {len(sizes)} chunks, {render.size(sum(sizes))}", highlight=False)
        there = {"url": url, "chunks": len(sizes), "bytes": sum(sizes)}
    figures(
        {
            "documents": documents,
            "chunks": held.chunks,
            "payload_bytes": held.payload_bytes,
            "built_for": built_for(held),
            "waiting": waits,
            "index": None if index is None else asdict(index),
            "remote": there,
        }
    )


def verify(
    store: Store = None,
    repair: Annotated[
        bool, typer.Option(help="Delete damaged records; they are computed again when needed.")
    ] = False,
) -> None:
    """Read every record of a store and report damage; exit code 1 if any is left."""
    with _store(store, readonly=not repair) as chunks:
        with progress() as reporter:
            bad = chunks.verify(repair=repair, progress=partial(reporter, "verify"))
        count, strays = chunks.stats().chunks, chunks.strays()
    for digest, wrong in bad.items():
        out.print(f"{digest[:16]}  {wrong}", highlight=False)
    done = "dropped" if repair else "damaged"
    out.print(
        f"{render.counted(count, 'chunk')}, {render.counted(len(bad), 'record')} {done}",
        highlight=False,
    )
    figures({"chunks": count, "damaged": bad, "repaired": repair, "strays": len(strays)})
    if strays:
        print_note(
            "note", f"{len(strays)} files below kv do not belong to the store, such as {strays[0]}"
        )
    if bad and not repair:
        raise typer.Exit(1)


def convert(
    layout: Annotated[
        str | None, typer.Argument(help="records, files, or auto: as suits the size of a layer.")
    ] = None,
    store: Store = None,
    codec: Codec = None,
    model: Model = None,
) -> None:
    """Move every chunk into LMDB (records) or into a file of its own (files), or encode it in
    another codec, without computing it again.

    With --codec the model is loaded, and the store keeps its chunks in that codec from then on.
    After a kill, the same command goes on.
    """
    from ragcache.store.disk.store import parse_layout

    if layout is None and codec is None:
        raise ConfigError(
            "say what to convert to: records, files or auto, or --codec with the name of a codec"
        )
    wanted = None if layout is None else parse_layout(layout)
    told: dict[str, object] = {}
    if codec is not None:
        told |= asdict(_recode(Settings.load(store=store, codec=codec, model=model)))
    if wanted is not None:
        with _store(store) as chunks, progress() as reporter:
            moved = chunks.convert(wanted, progress=partial(reporter, "convert"))
        out.print(f"{render.counted(moved, 'chunk')} moved", highlight=False)
        told |= {"moved": moved, "layout": wanted}
    figures(told)


def _recode(settings: Settings) -> Recoded:
    """Encode a store's chunks in the codec of the settings, and say what was done and left."""
    check_exists(settings.store, None)
    with (
        opened(settings.model_copy(update={"engine": "embedded"})) as cache,
        progress() as reporter,
    ):
        done = cache.recode(partial(reporter, "convert"))
    out.print(
        f"{render.counted(done.recoded, 'chunk')} in codec {settings.codec}: "
        f"{render.size(done.bytes_before)} before, {render.size(done.bytes_after)} now",
        highlight=False,
    )
    for count, why in (
        (done.lossy, "its codec has lost some precision, which is not stored as if it had not"),
        (done.unknown, "it is of another model or context, and is computed again when it is used"),
        (done.damaged, "it is damaged: run `ragcache verify --repair`"),
    ):
        if count:
            print_note("note", f"{render.counted(count, 'chunk')} left as stored: {why}")
    return done


def compact(store: Store = None) -> None:
    """Return unused space of a store to the file system; readers may continue meanwhile."""
    with _store(store) as chunks, waiting("copying the data in use"):
        before, after = chunks.compact()
    out.print(f"{render.size(before)} before, {render.size(after)} now", highlight=False)
    figures({"before_bytes": before, "after_bytes": after})


def doctor(store: Store = None, model: Model = None) -> None:
    """Check a store and the machine it is on; exit code 1 if something is bad."""
    from ragcache.cli.doctor import inspect_store
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.models import model_path
    from ragcache.setup import resolve_model_name
    from ragcache.store import Catalog

    with _store(store, lazy=True) as chunks:
        engine = None
        if model or Catalog(chunks).get_setting("model"):
            name = resolve_model_name(Catalog(chunks), model or "")
            codec = Catalog(chunks).get_setting("codec") or "raw"
            loading(name)
            engine = TransformersEngine.load(model_path(name), codec=codec)
        with waiting("measuring the disk"):
            found = list(inspect_store(chunks, engine))
    out.print(finding_table(found))
    bad = any(finding.state == "bad" for finding in found)
    figures({"findings": [asdict(finding) for finding in found], "bad": bad})
    if bad:
        raise typer.Exit(1)


def push(
    store: Store = None,
    remote: Remote = None,
    remote_codecs: RemoteCodecs = None,
    model: Model = None,
) -> None:
    """Upload chunks that the remote does not have.

    With --remote-codecs the model is loaded, and chunks of documents are uploaded in these codecs
    too.
    """
    settings = Settings.load(store=store, remote=remote, remote_codecs=remote_codecs, model=model)
    from ragcache.store.remote.sync import push as run

    with ExitStack() as stack:
        reporter = stack.enter_context(progress())
        if settings.remote_codecs:
            cache = stack.enter_context(opened(settings, lazy=True))
            both, wanted = cache.remote, cache.remote_copies()
            assert both is not None  # remote_codecs without a remote are refused
        else:
            both, wanted = stack.enter_context(_shared(store, remote, lazy=True)), {}
        both.flush(partial(reporter, "send"))
        done = run(both.disk, both.objects, copies=wanted, progress=partial(reporter, "push"))
        out.print(transfer_text(done, "pushed"), highlight=False)
        figures(asdict(done))


def pull(
    store: Store = None,
    remote: Remote = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="Download chunks of all texts, not only of this store's documents."
        ),
    ] = False,
) -> None:
    """Download chunks of the store's documents from the remote, as many as max_bytes allows."""
    from ragcache.store import Catalog
    from ragcache.store.remote.sync import pull as run

    with _shared(store, remote, bounded=True) as both, progress() as reporter:
        catalog = Catalog(both.disk)
        limit = both.disk.quota.total
        done = run(
            both.disk,
            both.objects,
            contents=None if every else catalog.contents(),
            codec=catalog.get_setting("codec") or "raw",
            room=None if limit is None else limit - both.stats().payload_bytes,
            progress=partial(reporter, "pull"),
        )
    out.print(transfer_text(done, "pulled"), highlight=False)
    figures(asdict(done))


def _store(
    path: Path | None,
    *,
    readonly: bool = False,
    lazy: bool = False,
    bounded: bool = False,
    tenant: str | None = None,
) -> DiskStore:
    """A store without a model, with its quota if ``bounded``. StoreError if there is none."""
    from ragcache.store import DiskStore
    from ragcache.store.disk.quota import UNBOUNDED, Quota
    from ragcache.store.tenants import tenant_folder

    settings = Settings.load(store=path)
    folder = tenant_folder(settings.store, tenant or "")
    check_exists(settings.store, tenant)
    quota = Quota(settings.max_bytes, settings.tenant_bytes) if bounded else UNBOUNDED
    return DiskStore(
        folder,
        readonly=readonly,
        lazy=lazy,
        layout=settings.layout,
        quota=quota,
        policy=settings.eviction,
    )


def _shared(
    path: Path | None,
    remote: str | None,
    tenant: str | None = None,
    *,
    lazy: bool = False,
    bounded: bool = False,
) -> RemoteStore:
    """A store and its remote, without a model. ConfigError if no remote is set."""
    url = Settings.load(remote=remote).remote
    if not url:
        raise ConfigError("no remote is set: give --remote, or set RAGCACHE_REMOTE")
    from ragcache.store.remote.store import open_remote

    chunks = _store(path, lazy=lazy, bounded=bounded, tenant=tenant)
    try:
        return open_remote(chunks, url)
    except BaseException:
        chunks.close()
        raise
