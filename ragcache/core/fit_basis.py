"""Learn the basis of the codec ``kvtc`` from a model's KV of the shipped articles.

See :mod:`ragcache.store.format.codecs.basis`. It needs no labels and nothing of the store's own
documents, so a basis may be copied wherever the model goes. It is computed once for a model and
version of ragcache, and cached in the user's cache folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from ragcache.engine.hf.kv_importance import kv_importance
from ragcache.models import ARTICLES
from ragcache.models.file_cache import user_folder
from ragcache.planning.context import DEFAULT_CONTEXT, encoding_context
from ragcache.store.format.codecs import codec
from ragcache.store.format.codecs.basis import Basis, bases_of
from ragcache.store.format.codecs.learn_basis import learn_basis

if TYPE_CHECKING:
    from ragcache.engine.base import ChunkEngine
    from ragcache.engine.hf.engine import TransformersEngine
    from ragcache.types import ChunkKV, Tokens

__all__ = ["codec_with_basis"]

logger = logging.getLogger(__name__)

_REVISION = "2"  # raised when another basis would be made of the same model

_CHUNK = 200  # tokens
_BATCH = 4  # chunks
_HELD_OUT = 4  # of so many articles, one
_WINDOW, _WINDOWS = 512, 6  # tokens from which, and texts in which importance is measured


def codec_with_basis(
    engine: TransformersEngine, level: str, store: Path, preferred: str = ""
) -> str:
    """The full name of the codec ``level``, one of :data:`LEVELS`, for the engine's KV. Its basis
    is then in the folder of the store: one of this model that was there, if possible the one with
    the digest ``preferred``, or is cached, or is learned now. Raises ConfigError if a package is
    missing, and StoreError if it cannot be written."""
    codec("cachegen")  # needs the same package: raises before the work
    own = [one.digest for one in bases_of(store) if one.is_of(engine.fingerprint)]
    if not own:
        made = _cached(engine)
        made.write(store)
        own = [made.digest]
    return f"{level}:{preferred if preferred in own else own[0]}"


def _model(engine: ChunkEngine) -> str:
    """What a basis names its model by."""
    return engine.fingerprint.with_codec("raw").digest.hex()


def _cached(engine: TransformersEngine) -> Basis:
    identity = blake3(f"{_REVISION} {_model(engine)}".encode()).hexdigest()
    file = user_folder("XDG_CACHE_HOME", ".cache") / f"basis-{identity}"
    with suppress(OSError, ValueError):
        checksum, data = (read := file.read_bytes())[:32], read[32:]
        if blake3(data).digest() == checksum:
            return Basis.parse(data)
    logger.warning("learning the basis of codec kvtc for %s, once", engine.name)
    made = fit_basis(engine)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(blake3(made.data).digest() + made.data)
        part.replace(file)
    return made


def fit_basis(engine: TransformersEngine) -> Basis:
    """The basis of a model."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(ARTICLES.glob("*.md"))]
    ids = [tuple(engine.tokenize(text)) for text in texts]
    used = [one for n, one in enumerate(ids) if n % _HELD_OUT]
    importance = kv_importance(engine.model, [one[:_WINDOW] for one in used[:_WINDOWS]])
    known = _encoded(engine, used), _encoded(engine, ids[::_HELD_OUT])
    return learn_basis(_model(engine), importance, *known)


def _encoded(engine: ChunkEngine, ids: Sequence[Tokens]) -> list[ChunkKV]:
    """The KV of the chunks of texts, as a store of the default encoding context has it."""
    encoding = encoding_context(DEFAULT_CONTEXT, engine)
    chunks = [one[at : at + _CHUNK] for one in ids for at in range(0, len(one), _CHUNK)]
    found: list[ChunkKV] = []
    for first in range(0, len(chunks), _BATCH):
        batch = chunks[first : first + _BATCH]
        found += engine.encode(batch, context=encoding.before(max(batch, key=len)))
    return found
