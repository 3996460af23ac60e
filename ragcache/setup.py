"""What a store is opened with: what the settings say, or else what it was built with.

The first value that was used with a store is written down in it, so that it goes on with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from ragcache.core.embedder_identity import EMBEDDER_DIGEST, check_same_embedder
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.engine.hf.device import published_dtype, resolve_device, resolve_dtype
from ragcache.engine.template import PromptTemplate
from ragcache.errors import ConfigError, ModelError
from ragcache.models import TINY
from ragcache.models.named import full_name, was_named
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.retriever.embed import Embedder, SentenceTransformerEmbedder
from ragcache.retriever.embedderfiles import PACKAGED
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk import kv_shapes
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs import codec
from ragcache.store.key import ChunkKey, at_level

if TYPE_CHECKING:
    from ragcache.store.remote.store import RemoteStore
    from ragcache.types import Fingerprint

PROMPT_DATE = "prompt_date"  # a store's setting: the date in its prompts, in ISO's format


def resolve_chunk_tokens(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> int:
    """The setting, else what the store was built with, else what the packaged embedder reads whole,
    and little enough that 32 chunks fit a context."""
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    recorded = catalog.get_setting("chunk_tokens")
    chosen = int(recorded) if recorded else min(256, engine.context_tokens // 32)
    record_settings(catalog, chunk_tokens=str(chosen))
    return chosen


def record_settings(catalog: Catalog, **settings: str) -> None:
    """Write down what a store was first used with, where nothing is, and this process may write."""
    new = {name: text for name, text in settings.items() if catalog.get_setting(name) is None}
    if new and catalog.refusal() is None:
        for name, text in new.items():
            catalog.put_setting(name, text)


def record_kv_shapes(store: DiskStore, own: Fingerprint, levels: Sequence[str]) -> None:
    """Note in a store what KV of its model, and of its levels, must be like; see shapes.py."""
    every = [own, *(at_level(ChunkKey(own, ()), name).fingerprint for name in levels)]
    with store.tables.read() as txn:
        new = kv_shapes.unnoted(txn, every)
    if new and store.refusal() is None:
        with store.tables.write() as txn:
            for fingerprint in new:
                kv_shapes.note(txn, fingerprint)


def attach_remote(
    store: DiskStore, engine: ChunkEngine, settings: Settings, *, pin: bool
) -> RemoteStore | None:
    """The store over a remote, where the settings have one."""
    if not settings.remote:
        if settings.levels:
            raise ConfigError("levels are what a remote is sent: set remote too, or leave them out")
        return None
    if not isinstance(engine, Engine):
        raise ConfigError(
            "vLLM reads the store in its folder and no remote: leave remote out, and fetch what "
            "is there with `ragcache pull`"
        )
    own = dict(engine.fingerprint.fields).get("codec", "raw")
    if settings.levels and not codec(own).faithful:
        raise ConfigError(
            f"levels are made of what is stored, and codec {own} has lost some of it: leave levels "
            "out, or begin a store with codec raw, bfloat16 or float16"
        )
    from ragcache.store.remote.store import shared

    return shared(store, settings.remote, settings.levels, pin=pin)


def resolve_codec(catalog: Catalog, settings: Settings, model: str | Path = "") -> str:
    """The setting, else the store's own, which is the first that was used with it.

    A new store takes the precision that ``model``, a folder or hub name, was published in, where
    this machine computes in float32: KV of float32 would say no more, in twice the bytes.
    """
    recorded = catalog.get_setting("codec")
    name = codec(settings.codec or recorded or _own_precision(catalog, settings, model)).name
    record_settings(catalog, codec=name)
    return name


def _own_precision(catalog: Catalog, settings: Settings, model: str | Path) -> str:
    if not model or catalog.get_setting("model") is not None:  # its KV is there already
        return "raw"
    own = published_dtype(model)
    wide = resolve_dtype(settings.dtype, resolve_device(settings.device).type) == "float32"
    return own if wide and own in ("bfloat16", "float16") else "raw"


def resolve_prompt_template(
    catalog: Catalog, engine: ChunkEngine, settings: Settings
) -> PromptTemplate:
    """The engine's, as of the store's day where its chat template puts a date into the prompt.

    That is the setting, else the store's own, which is the last that was set or else the first day
    on which it was opened: with another date, nothing that is stored could be used.
    """
    if engine.template.day is None:
        return engine.template
    recorded, asked = catalog.get_setting(PROMPT_DATE), settings.prompt_date
    if not isinstance(asked, str):
        day = asked
    else:
        day = date.fromisoformat(recorded) if recorded and not asked else date.today()
    if recorded != day.isoformat() and (asked or catalog.refusal() is None):
        catalog.put_setting(PROMPT_DATE, day.isoformat())
    return engine.template_on(day)


def resolve_encoding_context(
    catalog: Catalog, engine: ChunkEngine, settings: Settings, template: PromptTemplate
) -> EncodingContext:
    """The setting, else the store's own, which is the first that was used with it."""
    recorded = catalog.get_setting("compile")
    how = encoding_context(settings.compile or recorded or "prefix", engine, template)
    record_settings(catalog, compile=how.mode)
    return how


def resolve_model_name(catalog: Catalog, given: str) -> str:
    """The name of the model to load: ``given``, else what the store was built with, else the small
    one that ships. ConfigError where only the store names it: see :mod:`ragcache.models.named`."""
    recorded = catalog.get_setting("model")
    if given or recorded is None or recorded == TINY or was_named(recorded):
        return given or recorded or TINY
    raise ConfigError(
        f"the store was built with the model {recorded!r}, which you have not named on this "
        "machine, and a store may come from anybody. If you trust that model, name it once: give "
        f"--model {quote(recorded)}, RAGCACHE_MODEL, model in ragcache.toml, or in Python "
        "RagCache.open(path, model=...)"
    )


def load_embedder(catalog: Catalog, settings: Settings) -> Embedder:
    """The setting, else the store's own, else the packaged one. ConfigError where only the store
    names it, as for the model."""
    recorded = catalog.get_setting("embedder")
    if not settings.embedder and recorded and recorded != PACKAGED and not was_named(recorded):
        raise ConfigError(
            f"the store was embedded with {recorded!r}, which you have not named on this machine, "
            "and a store may come from anybody. If you trust that model, name it once: set "
            f"RAGCACHE_EMBEDDER={quote(recorded)}, or embedder in ragcache.toml"
        )
    if settings.embedder and recorded and catalog.get_setting(EMBEDDER_DIGEST) is None:
        alike = full_name(settings.embedder) == full_name(recorded)
        check_same_embedder(alike, settings.embedder, recorded)  # before it is loaded
    try:
        return SentenceTransformerEmbedder(settings.embedder or recorded or PACKAGED)
    except ModelError as error:
        if settings.embedder or not recorded:
            raise
        raise ModelError(
            f"the store was embedded with {recorded!r}, which cannot be loaded: {error}. If it is "
            "in another place now, name that: set RAGCACHE_EMBEDDER, or embedder in ragcache.toml"
        ) from error
