"""What a store is opened with: what the settings say, or else what it was built with.

The first value that was used with a store is written down in it, so that it goes on with that.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.compiled import Compiled, compiled
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.engine.precision import computed, published
from ragcache.engine.template import PromptTemplate
from ragcache.errors import ConfigError
from ragcache.retriever.embed import Embedder, SentenceTransformerEmbedder
from ragcache.settings import Settings
from ragcache.store.catalog import Catalog
from ragcache.store.codecs import codec
from ragcache.store.disk import DiskStore

if TYPE_CHECKING:
    from ragcache.store.remote import RemoteStore
    from ragcache.vllm.remote import VllmEngine


PROMPT_DATE = "prompt_date"  # a store's setting: the date in its prompts, in ISO's format


def chunk_tokens(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> int:
    """The setting, else what the store was built with, else what the packaged embedder reads whole,
    and little enough that 32 chunks fit a context."""
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    recorded = catalog.get_setting("chunk_tokens")
    chosen = int(recorded) if recorded else min(256, engine.context_tokens // 32)
    if recorded is None:
        catalog.put_setting("chunk_tokens", str(chosen))
    return chosen


def over_remote(
    store: DiskStore, engine: Engine | VllmEngine, settings: Settings, *, pin: bool
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
    from ragcache.store.remote import shared

    return shared(store, settings.remote, settings.levels, pin=pin)


def codec_of(catalog: Catalog, settings: Settings, model: str | Path = "") -> str:
    """The setting, else the store's own, which is the first that was used with it.

    A new store takes the precision that ``model``, a folder or hub name, was published in, where
    this machine computes in float32: KV of float32 would say no more, in twice the bytes.
    """
    recorded = catalog.get_setting("codec")
    name = codec(settings.codec or recorded or _own_precision(catalog, settings, model)).name
    if recorded is None:
        catalog.put_setting("codec", name)
    return name


def _own_precision(catalog: Catalog, settings: Settings, model: str | Path) -> str:
    if not model or catalog.get_setting("model") is not None:  # its KV is there already
        return "raw"
    from ragcache.engine.transformers import as_device

    own = published(model)
    wide = computed(settings.dtype, as_device(settings.device).type) == "float32"
    return own if wide and own in ("bfloat16", "float16") else "raw"


def prompt_template(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> PromptTemplate:
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
    if recorded != day.isoformat():
        catalog.put_setting(PROMPT_DATE, day.isoformat())
    return engine.template_on(day)


def compile_mode(
    catalog: Catalog, engine: ChunkEngine, settings: Settings, template: PromptTemplate
) -> Compiled:
    """The setting, else the store's own, which is the first that was used with it."""
    recorded = catalog.get_setting("compile")
    how = compiled(settings.compile or recorded or "prefix", engine, template)
    if recorded is None:
        catalog.put_setting("compile", how.mode)
    return how


def embedder_of(catalog: Catalog, settings: Settings) -> Embedder:
    """The setting, else the store's own, else the packaged one; ConfigError if they differ."""
    recorded = catalog.get_setting("embedder")
    if settings.embedder and recorded and settings.embedder != recorded:
        raise ConfigError(
            f"the store was embedded with {recorded!r}, and vectors of {settings.embedder!r} "
            "cannot be compared with those. Use the store's own, or index into a new folder."
        )
    name = settings.embedder or recorded
    return SentenceTransformerEmbedder(name) if name else SentenceTransformerEmbedder()


def servers(name: str | Path, path: Path, settings: Settings, codec: str) -> VllmEngine:
    """vLLM servers that were started with the store in ``path``."""
    try:
        from ragcache.vllm.remote import VllmEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine vllm needs {error.name}: pip install 'ragcache-fusion[vllm]'"
        ) from error
    if settings.dtype == "auto":
        raise ConfigError(
            "engine vllm needs to know the dtype that the servers were started with, for it is in "
            "every chunk's key: give --dtype float32, bfloat16 or float16"
        )
    key = settings.vllm_key.get_secret_value() if settings.vllm_key else ""
    urls = [url for url in settings.vllm_url.split(",") if url.strip()]
    return VllmEngine(name, urls, path, dtype=settings.dtype, codec=codec, api_key=key)
