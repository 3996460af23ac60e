"""What a store is opened with: what the settings say, or else what it was built with.

The first value that was used with a store is written down in it, so that it goes on with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.compiled import Compiled, compiled
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.errors import ConfigError
from ragcache.retriever.embed import Embedder, SentenceTransformerEmbedder
from ragcache.settings import Settings
from ragcache.store import shapes
from ragcache.store.catalog import Catalog
from ragcache.store.codecs import codec
from ragcache.store.disk import DiskStore
from ragcache.store.key import ChunkKey, at_level

if TYPE_CHECKING:
    from ragcache.store.remote import RemoteStore
    from ragcache.types import Fingerprint
    from ragcache.vllm.remote import VllmEngine


def chunk_tokens(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> int:
    """The setting, else what the store was built with, else what the packaged embedder reads whole,
    and little enough that 32 chunks fit a context."""
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    recorded = catalog.get_setting("chunk_tokens")
    chosen = int(recorded) if recorded else min(256, engine.context_tokens // 32)
    record(catalog, chunk_tokens=str(chosen))
    return chosen


def record(catalog: Catalog, **settings: str) -> None:
    """Write down what a store was first used with, where nothing is, and this process may write."""
    new = {name: text for name, text in settings.items() if catalog.get_setting(name) is None}
    if new and catalog.refusal() is None:
        for name, text in new.items():
            catalog.put_setting(name, text)


def note_shapes(store: DiskStore, own: Fingerprint, levels: Sequence[str]) -> None:
    """Note in a store what KV of its model, and of its levels, must be like; see shapes.py."""
    every = [own, *(at_level(ChunkKey(own, ()), name).fingerprint for name in levels)]
    with store.tables.read() as txn:
        new = shapes.unnoted(txn, every)
    if new and store.refusal() is None:
        with store.tables.write() as txn:
            for fingerprint in new:
                shapes.note(txn, fingerprint)


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
    if settings.levels and own != "raw":
        raise ConfigError(
            f"levels are made of what is stored, and codec {own} has lost some of it: leave levels "
            "out, or begin a store with codec raw"
        )
    from ragcache.store.remote import shared

    return shared(store, settings.remote, settings.levels, pin=pin)


def codec_of(catalog: Catalog, settings: Settings) -> str:
    """The setting, else the store's own, which is the first that was used with it."""
    recorded = catalog.get_setting("codec")
    name = codec(settings.codec or recorded or "raw").name
    record(catalog, codec=name)
    return name


def compile_mode(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> Compiled:
    """The setting, else the store's own, which is the first that was used with it."""
    recorded = catalog.get_setting("compile")
    how = compiled(settings.compile or recorded or "prefix", engine)
    record(catalog, compile=how.mode)
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
