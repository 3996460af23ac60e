"""A store whose chunks are encoded in another codec, without computing them again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ragcache.errors import StoreError
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.store.base import Miss
from ragcache.store.disk.recode import Recoded
from ragcache.store.key import ChunkKey, variant_key
from ragcache.types import ChunkKV, ChunkNotes
from tests import scene
from tests.store.samples import rewrite, rewrite_layer

QUESTION = "Where does Mira Holt live?"


def opened(path: Path, **settings: Any) -> RagCache:
    return RagCache.open(path, settings=Settings.load(store=path, ratio=0.15, **settings))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with opened(path, codec="raw") as cache:
        cache.add(scene.DOCUMENTS)
    return path


def stored(cache: RagCache) -> dict[ChunkKey, ChunkKV | Miss]:
    keys = [key for entry in cache.catalog.entries() for key in cache.indexing.keys(entry.id)]
    return {key: cache.store.get(key) for key in (*keys, cache.indexing.prefix_key)}


def numbers(kv: ChunkKV | Miss) -> tuple[list[list[list[list[float]]]], tuple[float, ...]]:
    assert isinstance(kv, ChunkKV)
    return [plane.tolist() for plane in (*kv.keys, *kv.values)], kv.sensitivity


@pytest.mark.parametrize("codec", ["int8", "bfloat16", "cachegen", "kvtc16"])
def test_every_chunk_is_as_if_it_had_been_stored_in_the_other_codec(
    store: Path, tmp_path: Path, codec: str
) -> None:
    told: list[tuple[int, int]] = []
    with opened(store, codec=codec) as cache:
        done = cache.recode(lambda *n: told.append(n))
        found = stored(cache)
        assert cache.usable() == (len(found), len(found))
        assert cache.recode() == Recoded(there=len(found))
        assert cache.store.verify() == {}
        payload = cache.store.stats().payload_bytes
    assert (done.recoded, done.bytes_after) == (len(found), payload)
    assert done.bytes_before > done.bytes_after and told[-1] == (len(found),) * 2
    with opened(tmp_path / "other", codec=codec) as other:
        other.add(scene.DOCUMENTS)
        wanted = stored(other)
    assert {key.digest: numbers(kv) for key, kv in found.items()} == {
        key.digest: numbers(kv) for key, kv in wanted.items()
    }
    with opened(store) as cache:  # its codec is the store's own now
        assert cache.engine.fingerprint.codec.partition(":")[0] == codec
        report = cache.ask(QUESTION, mode="fused").report
    assert report.reused_tokens and not any(chunk.miss for chunk in report.chunks)


def test_a_kill_leaves_the_rest_for_the_next_call(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(store, codec="int8") as cache:
        every = len(stored(cache))

        def stop(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.recode(stop)
    with opened(store) as cache:
        assert cache.usable() == (2, every)
        done = cache.recode()
        assert (done.recoded, done.there) == (every - 2, 2)
        assert cache.usable() == (every, every)


def test_what_cannot_be_recoded_stays_and_is_counted(store: Path) -> None:
    with opened(store, codec="raw") as cache:
        keys = list(stored(cache))
        kv = cache.store.get(keys[0])
        assert isinstance(kv, ChunkKV)
        other = replace(cache.engine.fingerprint, fields=(("model", "another"), ("codec", "raw")))
        apart = [
            ChunkKey(other, kv.tokens),  # of another model
            ChunkKey(cache.engine.fingerprint, kv.tokens, kv.tokens[:2]),  # after other text
        ]
        for key in apart:
            cache.store.put(key, kv)
        rewrite(cache.store, "headers", keys[1].digest, lambda raw: raw[:-1])
    with opened(store, codec="int8") as cache:
        done = cache.recode()
        assert (done.recoded, done.unknown, done.lossy) == (len(keys) - 1, 2, 0)
        for key in apart:
            assert numbers(cache.store.get(key)) == numbers(kv)
    with opened(store, codec="cachegen") as cache:  # int8 has lost some precision
        with pytest.raises(StoreError, match="no chunk can be encoded in codec cachegen: .* lost"):
            cache.recode()
    with opened(store) as cache:
        assert cache.engine.fingerprint.codec == "int8" and cache.usable()[0] == len(keys) - 1


def test_a_more_exact_chunk_is_kept(store: Path) -> None:
    with opened(store, codec="raw") as cache:
        exact = {key.digest: numbers(kv) for key, kv in stored(cache).items()}
    with opened(store, codec="bfloat16") as cache:
        cache.add(scene.DOCUMENTS)
        cache.store.put(*next(iter(stored(cache).items())))  # type: ignore[arg-type]
    with opened(store, codec="raw") as cache:
        done = cache.recode()
        assert done.recoded == 0 and done.there >= len(exact)
        assert {key.digest: numbers(kv) for key, kv in stored(cache).items()} == exact


def test_a_quota_that_is_too_small_is_said(store: Path) -> None:
    with opened(store, codec="int8") as cache:
        cache.add(scene.DOCUMENTS)
    with opened(store, codec="bfloat16") as cache:
        cache.recode()
        held = cache.store.stats().payload_bytes
    with opened(store, codec="raw", max_bytes=int(held * 1.1)) as cache:
        with pytest.raises(StoreError, match="do not fit into the quota in codec raw"):
            cache.recode()


def test_a_damaged_layer_is_counted_and_left(store: Path) -> None:
    with opened(store, codec="raw") as cache:
        keys = list(stored(cache))
        rewrite_layer(cache.store, keys[0], 1, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    with opened(store, codec="int8") as cache:
        done = cache.recode()
        assert (done.damaged, done.recoded) == (1, len(keys) - 1)


def test_variants_keep_their_notes(store: Path) -> None:
    with opened(store, codec="raw") as cache:
        (key, kv), *_ = stored(cache).items()
        assert isinstance(kv, ChunkKV)
        noted = variant_key(key.fingerprint, key.tokens, (7,))
        notes = ChunkNotes((), (), (0.5,) * len(kv.tokens), 0.6)
        cache.store.variants.put(noted, kv, notes)
        cache.store.variants.add_score({noted: 2.0})
    with opened(store, codec="int8") as cache:
        cache.recode()
        key = replace(key, fingerprint=cache.engine.fingerprint)
        (found,) = cache.store.variants.find(key)
    assert (found.notes, found.score) == (notes, 2.0)


@pytest.mark.parametrize("max_bytes", [None, "as much as there is"])
def test_a_quota_that_was_full_evicts_nothing(store: Path, max_bytes: str | None) -> None:
    with opened(store, codec="raw") as cache:
        every, held = len(stored(cache)), cache.store.stats().payload_bytes
    with opened(store, codec="int8", max_bytes=held if max_bytes else None) as cache:
        assert cache.recode().recoded == every
        assert (cache.store.stats().chunks, cache.store.stats().evictions) == (every, 0)


def test_a_remote_gets_the_new_chunks_and_keeps_the_old(store: Path, tmp_path: Path) -> None:
    remote = (tmp_path / "remote").as_uri()
    os.mkdir(tmp_path / "remote")
    with opened(store, codec="int8", remote=remote) as cache:
        every = cache.recode().recoded
        assert cache.remote is not None
        cache.remote.flush()
        assert sum(1 for _ in cache.remote.objects.names()) == every
