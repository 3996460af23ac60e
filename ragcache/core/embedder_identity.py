"""Which embedder made the vectors of a store, known by a digest of its files: it may be moved."""

from __future__ import annotations

from ragcache.errors import ConfigError
from ragcache.models.trusted_names import absolute_name
from ragcache.retriever.embed import DigestedEmbedder, Embedder
from ragcache.store.catalog.catalog import Catalog

_FIRST = "embedder_first"  # a store's setting: what its embedder was called before it was moved
DIGEST = "embedder_digest"  # a store's setting: of the embedder that made its vectors


def record_embedder(catalog: Catalog, embedder: Embedder) -> None:
    """Write down whose vectors a store has. ConfigError where it has those of another embedder.

    They are told apart by their digests, so that a model may be moved, and not be exchanged; a
    store that has none, of an earlier release, knows its embedder by name, and is given one.
    """
    name = absolute_name(embedder.name)
    recorded, known = catalog.get_setting("embedder"), catalog.get_setting(DIGEST)
    digest = embedder.digest if isinstance(embedder, DigestedEmbedder) else None
    new: dict[str, str] = {}
    if recorded is None:
        new["embedder"] = name
    else:
        by_name = digest is None or known is None
        same = name == absolute_name(recorded) if by_name else digest == known
        check_same(same, embedder.name, recorded)
        if name != absolute_name(recorded):  # it was moved
            if catalog.get_setting(_FIRST) is None:
                new[_FIRST] = recorded
            new["embedder"] = name
    if known is None and digest is not None:
        new[DIGEST] = digest
    if new and catalog.refusal() is None:
        for setting, text in new.items():
            catalog.put_setting(setting, text)


def embedder_known_as(catalog: Catalog, embedder: Embedder) -> str:
    """What the records of documents call the embedder of their vectors, wherever it lies by now."""
    first = catalog.get_setting(_FIRST) or catalog.get_setting("embedder")
    return first or embedder.name


def check_same(same: bool, name: str, recorded: str) -> None:
    if not same:
        changed = " as it was then" if name == recorded else ""
        raise ConfigError(
            f"the store was embedded with {recorded!r}{changed}, and vectors of {name!r}"
            f"{' as it is now' if changed else ''} cannot be compared with those. Use the store's "
            "own, or index into a new folder."
        )
