"""Resolve the options that a store is opened with: a setting, else the value recorded in the store.

The first value that is used with a store is recorded in it, and is the default from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

from ragcache.core.embedder_identity import EMBEDDER_DIGEST, check_same_embedder
from ragcache.core.fit_basis import codec_with_basis
from ragcache.core.request import RetrieveOptions
from ragcache.engine.base import ChunkEngine, Engine
from ragcache.engine.hf.device import published_dtype, resolve_device, resolve_dtype
from ragcache.engine.template import PromptTemplate
from ragcache.errors import ConfigError, ModelError, RemoteError
from ragcache.models import TINY, is_packaged
from ragcache.models.trusted_names import absolute_name, is_trusted
from ragcache.planning.context import DEFAULT_CONTEXT, EncodingContext, encoding_context
from ragcache.retriever.embed import Embedder, SentenceTransformerEmbedder
from ragcache.retriever.embedder_files import PACKAGED
from ragcache.retriever.rerank import CrossEncoderReranker, Reranker
from ragcache.retriever.search_options import SearchOptions
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk import kv_shapes
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs import codec, find_codec
from ragcache.store.format.codecs.basis import bases_of, find_basis
from ragcache.store.format.codecs.kvtc import LEVELS
from ragcache.store.key import ChunkKey, with_codec
from ragcache.util.option_names import check_options

if TYPE_CHECKING:
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.store.remote.store import RemoteStore
    from ragcache.types import Fingerprint

__all__ = [
    "PROMPT_DATE",
    "attach_remote",
    "load_embedder",
    "load_reranker",
    "record_codecs",
    "record_settings",
    "resolve_chunk_tokens",
    "resolve_codec",
    "resolve_encoding_context",
    "resolve_model_name",
    "resolve_prompt_template",
    "resolve_search",
    "settle_codec",
]

logger = logging.getLogger(__name__)

_TOP_K = 4  # chunks that are retrieved for a question
_MOST_CHUNKS = 1000  # that are retrieved for a question
_RERANK = 50  # chunks that a reranker reads for a question
PROMPT_DATE = "prompt_date"  # setting in the store: the date in its prompts, in ISO format


def resolve_chunk_tokens(catalog: Catalog, engine: ChunkEngine, settings: Settings) -> int:
    """Maximum tokens per chunk: the setting, else the store's own, else 256 (the window of the
    packaged embedder), or a 32nd of the model's context if that is less."""
    if settings.chunk_tokens is not None:
        return settings.chunk_tokens
    recorded = catalog.get_setting("chunk_tokens")
    chosen = int(recorded) if recorded else min(256, engine.context_tokens // 32)
    record_settings(catalog, chunk_tokens=str(chosen))
    return chosen


def record_settings(catalog: Catalog, **settings: str) -> None:
    """Record settings in the store that it does not have yet, if this process may write to it."""
    new = {name: text for name, text in settings.items() if catalog.get_setting(name) is None}
    if new and catalog.refusal() is None:
        for name, text in new.items():
            catalog.put_setting(name, text)


def record_codecs(store: DiskStore, own: Fingerprint, codecs: Sequence[str]) -> None:
    """Record the shape of the model's KV, for its own codec and for ``codecs``, and keep the bases
    of these in the store."""
    if store.refusal() is None:
        for name in (own.codec, *codecs):
            found = find_basis(name.partition(":")[2])
            if not isinstance(found, str) and not found.is_in(store.tables.path):
                found.write(store.tables.path)
    every = [own, *(with_codec(ChunkKey(own, ()), name).fingerprint for name in codecs)]
    with store.tables.read() as txn:
        new = kv_shapes.unrecorded(txn, every)
    if new and store.refusal() is None:
        with store.tables.write() as txn:
            for fingerprint in new:
                kv_shapes.record_shape(txn, fingerprint)


def attach_remote(
    store: DiskStore, engine: ChunkEngine, settings: Settings, *, pin: bool
) -> RemoteStore | None:
    """The store with the remote of the settings; None if they have no remote.

    ``pin``: read into page-locked memory. Raises ConfigError for settings that contradict each
    other.
    """
    if not settings.remote:
        if settings.remote_codecs:
            raise ConfigError(
                "remote_codecs are the codecs in which chunks are sent to a remote: set remote "
                "too, or leave remote_codecs out"
            )
        return None
    if not isinstance(engine, Engine):
        raise ConfigError(
            "vLLM reads only the store in its folder: leave remote out, and copy the remote's "
            "chunks into the store with `ragcache pull`"
        )
    from ragcache.store.remote.store import open_remote

    own = engine.fingerprint.codec
    if settings.remote_codecs and not codec(own).faithful:
        raise ConfigError(
            f"remote_codecs encode what is stored, and codec {own} has lost some of it: leave "
            "remote_codecs out, or begin a store with codec raw, bfloat16 or float16"
        )
    folder = store.tables.path
    names = [name.strip() for name in settings.remote_codecs.split(",") if name.strip()]
    names = [_with_basis(engine, name, folder) for name in names]
    used = sorted(name for name in {own, *names} if name.partition(":")[0] in LEVELS)
    mark = " ".join([settings.remote, *used])
    if used and mark != Catalog(store).get_setting("shared_bases"):
        shared = _share_bases(settings.remote, folder)
        if shared and store.refusal() is None:
            Catalog(store).put_setting("shared_bases", mark)
    return open_remote(store, settings.remote, names, pin=pin)


def resolve_codec(catalog: Catalog, settings: Settings, model: str | Path = "") -> str:
    """The codec of stored KV: the setting, else the store's own, else the published dtype.

    A new store stores KV in the 16-bit dtype in which ``model`` (a folder, file or hub name) was
    published, if this machine computes in float32: float32 would take twice the bytes without
    more information. Otherwise its codec is raw. A codec that needs a basis which the store does
    not have is returned without one: see :func:`settle_codec`.
    """
    recorded = catalog.get_setting("codec")
    name = settings.codec or recorded or _own_precision(catalog, settings, model)
    if name in LEVELS and recorded is not None and recorded.startswith(f"{name}:"):
        name = recorded
    if name in LEVELS or (name == recorded and isinstance(find_codec(name), str)):
        level = name.partition(":")[0]
        record_settings(catalog, codec=level)
        return level
    name = codec(name).name
    record_settings(catalog, codec=name)
    return name


def settle_codec(
    catalog: Catalog, engine: TransformersEngine, name: str, store: Path, settings: Settings
) -> None:
    """Let ``engine`` store KV in the codec ``name``, which :func:`resolve_codec` returned: where it
    lacks its basis, or has that of another model, with one that the store, the remote or the user's
    cache has, or that is made now. Raises ConfigError and StoreError."""
    level, _, digest = name.partition(":")
    if level not in LEVELS:
        return
    recorded = catalog.get_setting("codec") or ""
    if settings.remote and not any(one.is_of(engine.fingerprint) for one in bases_of(store)):
        _share_bases(settings.remote, store)
    preferred = digest or recorded.partition(":")[2]
    full = codec_with_basis(engine, level, store, preferred)
    engine.fingerprint = engine.fingerprint.with_codec(full)
    if recorded.partition(":")[0] == level and recorded != full and catalog.refusal() is None:
        catalog.put_setting("codec", full)


def _with_basis(engine: Engine, name: str, store: Path) -> str:
    own = cast("TransformersEngine", engine)  # the only Engine
    return codec_with_basis(own, name, store) if name in LEVELS else name


def _share_bases(url: str, store: Path) -> bool:
    """Share bases with the remote. Returns whether it could be reached."""
    from ragcache.store.remote.bases import share_bases
    from ragcache.store.remote.object_store import Bucket

    try:
        share_bases(Bucket(url), store)
    except RemoteError as error:
        logger.warning("the bases of codec kvtc cannot be shared with the remote: %s", error)
        return False
    return True


def _own_precision(catalog: Catalog, settings: Settings, model: str | Path) -> str:
    if not model or catalog.get_setting("model") is not None:  # the store has KV already
        return "raw"
    own = published_dtype(model)
    wide = resolve_dtype(settings.dtype, resolve_device(settings.device).type) == "float32"
    return own if wide and own in ("bfloat16", "float16") else "raw"


def resolve_prompt_template(
    catalog: Catalog, engine: ChunkEngine, settings: Settings
) -> PromptTemplate:
    """The engine's template; with the store's date if the chat template puts one into the prompt.

    The date is the setting, else the store's own: the last one that was set, or the day on which
    the store was first opened. With another date, no stored chunk could be used.
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
    """The tokens before a chunk while its KV is computed: the setting, else the store's own, else
    :data:`DEFAULT_CONTEXT`. Raises ConfigError for an unknown name.

    The oldest stores have KV, but do not say after what it was computed: after the prefix.
    """
    own = DEFAULT_CONTEXT if catalog.get_setting("model") is None else "prefix"
    name = settings.encoding_context or catalog.get_setting("compile") or own
    how = encoding_context(name, engine, template)
    record_settings(catalog, compile=how.mode)
    return how


def resolve_model_name(catalog: Catalog, given: str) -> str:
    """The model to load: ``given``, else the store's own, else the small model of the package.

    Raises ConfigError if only the store names the model: see :mod:`ragcache.models.trusted_names`.
    """
    recorded = catalog.get_setting("model")
    if given or recorded is None or is_packaged(recorded) or is_trusted(recorded):
        return given or recorded or TINY
    raise ConfigError(
        f"the store was built with the model {recorded!r}, which you have not named on this "
        "machine, and a store may come from anybody. If you trust that model, name it once: give "
        f"--model {quote(recorded)}, RAGCACHE_MODEL, model in ragcache.toml, or in Python "
        "RagCache.open(path, model=...)"
    )


def load_embedder(catalog: Catalog, settings: Settings) -> Embedder:
    """Load the embedder: the setting, else the store's own, else the packaged one.

    Raises ConfigError if only the store names it, as for the model, or if the setting is another
    embedder than the store's; ModelError if it cannot be loaded.
    """
    recorded = catalog.get_setting("embedder")
    if not settings.embedder and recorded and recorded != PACKAGED and not is_trusted(recorded):
        raise ConfigError(
            f"the store was embedded with {recorded!r}, which you have not named on this machine, "
            "and a store may come from anybody. If you trust that model, name it once: set "
            f"RAGCACHE_EMBEDDER={quote(recorded)}, or embedder in ragcache.toml"
        )
    if settings.embedder and recorded and catalog.get_setting(EMBEDDER_DIGEST) is None:
        alike = absolute_name(settings.embedder) == absolute_name(recorded)
        check_same_embedder(alike, settings.embedder, recorded)  # before it is loaded
    try:
        return SentenceTransformerEmbedder(settings.embedder or recorded or PACKAGED)
    except ModelError as error:
        if settings.embedder or not recorded:
            raise
        raise ModelError(
            f"the store was embedded with {recorded!r}, which cannot be loaded: {error}. If it has "
            "been moved, set RAGCACHE_EMBEDDER, or embedder in ragcache.toml, to its new path"
        ) from error


def load_reranker(settings: Settings) -> Reranker | None:
    """Load the reranker that the settings name, if any. Raises ModelError if it cannot be."""
    if not settings.reranker:
        return None
    return CrossEncoderReranker(settings.reranker)


def resolve_search(
    settings: Settings, given: RetrieveOptions, without: Iterable[str] = ()
) -> SearchOptions:
    """The options of a search: those given, or else of the settings. Raises TypeError for unknown
    ones, and ConfigError for values out of their range."""
    names = RetrieveOptions.__annotations__
    check_options(given, names, "a search")
    chosen: dict[str, Any] = {
        name: getattr(settings, name, None) if given.get(name) is None else given.get(name)
        for name in names
    }
    if chosen["top_k"] is None:
        tokens = chosen["top_tokens"]
        chosen["top_k"] = _TOP_K if tokens is None else min(_MOST_CHUNKS, max(1, tokens))
    if chosen["rerank"] is None:
        chosen["rerank"] = _RERANK if settings.reranker else 0
    return SearchOptions(chosen.pop("top_k"), **chosen, without=without)
