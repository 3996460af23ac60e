"""Identify the embedder that made the vectors of a store, by a digest of its files."""

from __future__ import annotations

from ragcache.errors import ConfigError
from ragcache.models.trusted_names import absolute_name
from ragcache.retriever.embed import DigestedEmbedder, Embedder
from ragcache.store.catalog.catalog import Catalog

__all__ = ["EMBEDDER_DIGEST", "check_same_embedder", "record_embedder"]

_FIRST = "embedder_first"  # setting in the store: the embedder's name before its files were moved
EMBEDDER_DIGEST = "embedder_digest"  # setting in the store: digest of the embedder's files


def record_embedder(catalog: Catalog, embedder: Embedder) -> None:
    """Record the embedder in its store. ConfigError if the store has vectors of another one.

    Embedders are compared by digest, so the files may be moved but not changed. A store of an
    earlier release has no digest: embedders are compared by name, and the digest is added.
    """
    name = absolute_name(embedder.name)
    recorded, known = catalog.get_setting("embedder"), catalog.get_setting(EMBEDDER_DIGEST)
    digest = embedder.digest if isinstance(embedder, DigestedEmbedder) else None
    new: dict[str, str] = {}
    if recorded is None:
        new["embedder"] = name
    else:
        by_name = digest is None or known is None
        same = name == absolute_name(recorded) if by_name else digest == known
        check_same_embedder(same, embedder.name, recorded)
        if name != absolute_name(recorded):  # same files in another place
            if catalog.get_setting(_FIRST) is None:
                new[_FIRST] = recorded
            new["embedder"] = name
    if known is None and digest is not None:
        new[EMBEDDER_DIGEST] = digest
    if new and catalog.refusal() is None:
        for setting, text in new.items():
            catalog.put_setting(setting, text)


def embedder_known_as(catalog: Catalog, embedder: Embedder) -> str:
    """The name of the embedder in the records of documents: the first one, if it was moved."""
    first = catalog.get_setting(_FIRST) or catalog.get_setting("embedder")
    return first or embedder.name


def check_same_embedder(same: bool, name: str, recorded: str) -> None:
    """Raise ConfigError unless the embedder called ``name`` is the ``same`` as the recorded one."""
    if not same:
        changed = " before its files changed" if name == recorded else ""
        raise ConfigError(
            f"the store was embedded with {recorded!r}{changed}, and vectors of {name!r} cannot be "
            "compared with those. Use the store's own embedder, or index into a new folder."
        )
