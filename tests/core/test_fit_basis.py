"""Stores whose codec needs a basis: made once, kept with the store, shared with a remote."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.core import fit_basis as module
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError, StoreError
from ragcache.eval.dataset import first_questions, load_dataset
from ragcache.eval.evaluate import compare, make_blenders
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.store.base import Miss
from ragcache.store.disk.store import DiskStore
from ragcache.store.format.codecs import basis as basis_module
from ragcache.store.format.codecs.basis import FOLDER, bases_of, basis_files
from ragcache.store.format.header import Header, decode_header, encode_header
from ragcache.types import Document
from tests import scene

QUESTION = "Where does Mira Holt live?"
DOCUMENTS = [Document("report", scene.report(3)), *scene.DOCUMENTS]


@pytest.fixture(scope="module", autouse=True)
def cache_folder(learned_basis: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache of this module, with the small model's basis: what else the module learns,
    the others do not have."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copytree(learned_basis / "ragcache", folder / "ragcache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def opened(path: Path, **settings: Any) -> RagCache:
    return RagCache.open(path, settings=Settings.load(store=path, ratio=0.15, **settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with documents, in codec kvtc16."""
    path = tmp_path_factory.mktemp("made") / "store"
    with opened(path, codec="kvtc16") as cache:
        cache.add(DOCUMENTS)
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def test_the_store_keeps_its_basis_and_takes_a_sixteenth(store: Path) -> None:
    with opened(store) as cache:
        spec, stats = cache.engine.spec, cache.store.stats()
        [path] = basis_files(store)
        assert cache.engine.fingerprint.codec == f"kvtc16:{path.stem}"
        assert cache.catalog.get_setting("codec") == f"kvtc16:{path.stem}"
        tokens = sum(len(cache.engine.tokenize(document.text)) for document in DOCUMENTS)
        assert stats.payload_bytes < spec.chunk_bytes(tokens) / 2 / 16 * 1.3
        report = cache.ask(QUESTION).report
        assert report.reused_tokens > 0 and all(chunk.miss is None for chunk in report.chunks)
        assert cache.store.verify() == {}


def test_answers_come_from_what_was_stored(store: Path) -> None:
    """All layers of a chunk are there, in any order, and near to what the model computes."""
    with opened(store) as cache:
        chunk = cache.retrieve(QUESTION)[0].chunk
        key = cache.indexing.key(chunk)
        whole = cache.store.get(key)
        assert not isinstance(whole, Miss)
        for layer in (5, 0, 11, 1, 6):
            keys, values = cache.store.layer(key, layer)
            assert torch.equal(keys, whole.keys[layer])
            assert torch.equal(values, whole.values[layer])
        [fresh] = cache.engine.encode([key.tokens], context=key.context)
        off = sum(
            float((a - b).square().mean() / b.square().mean())
            for a, b in zip((*whole.keys, *whole.values), (*fresh.keys, *fresh.values), strict=True)
        )
        assert 0 < off / 24 < 0.15


@pytest.mark.parametrize("layout", ["files", "records"])
def test_any_layout(tmp_path: Path, made: Path, layout: str) -> None:
    with opened(tmp_path / "store", codec="kvtc12", layout=layout) as cache:
        cache.add(DOCUMENTS)
        report = cache.ask(QUESTION, mode="reuse").report
        assert report.reused_tokens > 0 and not any(chunk.miss for chunk in report.chunks)
        assert report.bytes_loaded == sum(layer.load_bytes for layer in report.layers)


def test_another_store_has_the_basis_from_the_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fit_basis", _not_again)
    with opened(tmp_path / "other", codec="kvtc8") as cache:
        assert cache.engine.fingerprint.codec == f"kvtc8:{basis_files(made)[0].stem}"


def test_a_lost_basis_is_found_in_the_cache(store: Path) -> None:
    shutil.rmtree(store / FOLDER)
    with opened(store) as cache:
        assert len(basis_files(store)) == 1
        assert not any(chunk.miss for chunk in cache.ask(QUESTION).report.chunks)


def test_a_damaged_cache_is_learned_again(
    made: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [file] = cache_folder.glob("ragcache/basis-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    copy = tmp_path / "ragcache" / file.name
    copy.parent.mkdir()
    copy.write_bytes(data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "fit_basis", _not_again)
    with pytest.raises(AssertionError, match="learned again"):
        opened(tmp_path / "other", codec="kvtc16")


def test_each_tenant_has_a_copy(store: Path, tmp_path: Path) -> None:
    with (
        opened(store) as cache,
        RagCache.open(tmp_path / "guest", beside=cache, tenant="guest") as guest,
    ):
        guest.add(DOCUMENTS)
        assert basis_files(tmp_path / "guest")[0].name == basis_files(store)[0].name
        assert not any(chunk.miss for chunk in guest.ask(QUESTION).report.chunks)


@pytest.mark.parametrize("room", [None, "1KB"], ids=["keeps", "full"])
def test_machines_that_share_a_remote_share_the_basis(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str | None
) -> None:
    """Also one whose disk has no room for chunks."""
    pytest.importorskip("obstore")
    remote = f"file://{tmp_path / 'remote'}"
    (tmp_path / "remote").mkdir()
    with opened(tmp_path / "one", codec="kvtc16", remote=remote) as one:
        one.add(DOCUMENTS)
        assert one.remote is not None
        one.remote.flush()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(module, "fit_basis", _not_again)
    with opened(tmp_path / "two", codec="kvtc16", remote=remote, max_bytes=room) as two:
        assert two.engine.fingerprint.codec == one.engine.fingerprint.codec
        chunks = [document.text for document in scene.DOCUMENTS]
        report = two.ask(QUESTION, chunks=chunks, mode="reuse").report
        assert not any(chunk.miss for chunk in report.chunks)
        assert report.bytes_loaded > 0
        assert two.remote is not None
        # The bytes of a group are read once, though its layers are read by several threads.
        assert two.remote.traffic.read_bytes == report.bytes_loaded


def test_copies_for_slow_links(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "remote").mkdir()
    remote = f"file://{tmp_path / 'remote'}"
    given = {"codec": "bfloat16", "remote": remote, "remote_codecs": "kvtc16"}
    with opened(tmp_path / "one", **given) as one:
        one.add(scene.DOCUMENTS)
        assert one.remote is not None
        one.remote.flush()
        assert one.remote.remote_codecs == (f"kvtc16:{basis_files(tmp_path / 'one')[0].stem}",)
        assert [path.name for path in (tmp_path / "remote" / FOLDER).iterdir()] == [
            path.name for path in basis_files(tmp_path / "one")
        ]


def test_an_evaluation_uses_it(made: Path) -> None:
    """In a process of its own, too, for which only the cache has the basis."""
    contexts = first_questions(load_dataset(world_file("prompts.jsonl")), 1)
    modes = make_blenders(["full", "reuse"])
    loaded = {}
    for name in ("bfloat16", "kvtc16"):
        settings = Settings.load(codec=name)
        [(_, found)] = compare(settings, {"world": contexts}, modes, max_tokens=2)
        loaded[name] = found[1].bytes_loaded
    assert 10 < loaded["bfloat16"] / loaded["kvtc16"] < 20


def test_without_the_package_nothing_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setattr(module, "fit_basis", _not_again)
    with pytest.raises(ConfigError, match="need constriction: pip install"):
        opened(tmp_path / "store", codec="kvtc16")


def test_an_unknown_codec_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "load", _not_again)
    with pytest.raises(ConfigError, match="codec 'kvtc17' is unknown"):
        opened(tmp_path / "store", codec="kvtc17")


def _not_again(*_: object, **__: object) -> None:
    raise AssertionError("learned again")


def test_reading_needs_no_engine(store: Path) -> None:
    """The basis of a store is found by whoever opens it."""
    with DiskStore(store, readonly=True) as found:
        assert found.verify() == {}


def without_basis(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage the basis of the store, and forget it, as in another process."""
    for path in basis_files(store):
        path.write_bytes(b"damaged")
    monkeypatch.setattr(basis_module, "_LOADED", {})
    monkeypatch.setattr(basis_module, "_FOLDERS", {})


@pytest.mark.parametrize("layout", ["files", "records"])
def test_without_its_basis_nothing_is_lost(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Not by a writer, which removes files that no header names, and not by a repair."""
    path = tmp_path / "store"
    with opened(path, codec="kvtc16", layout=layout) as cache:
        cache.add(DOCUMENTS)
        chunks = cache.store.stats().chunks
    without_basis(path, monkeypatch)
    with DiskStore(path) as store:
        assert set(store.verify().values()) == {next(iter(store.verify().values()))}
        with pytest.raises(StoreError, match="Nothing is repaired"):
            store.verify(repair=True)
        assert store.stats().chunks == chunks and store.stats().payload_bytes > 0
    with opened(path) as cache:  # restored from the cache
        assert cache.store.verify() == {} and cache.store.stats().chunks == chunks
        assert not any(chunk.miss for chunk in cache.ask(QUESTION).report.chunks)


def test_documents_are_deleted_without_the_basis(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(store) as cache:
        ids = [entry.id for entry in cache.documents()]
    without_basis(store, monkeypatch)
    with DiskStore(store) as found:
        before = found.stats()
    with opened(store) as cache:
        cache.delete(ids)
        assert cache.store.stats().chunks <= 1 < before.chunks  # the prefix of prompts


def test_files_of_a_later_version_are_kept(made: Path, tmp_path: Path) -> None:
    """Their headers cannot be read: this version does not know whether they are named."""
    path = tmp_path / "store"
    with opened(path, codec="raw", layout="files") as cache:
        cache.add(scene.DOCUMENTS)
        key = cache.indexing.key(cache.retrieve(QUESTION)[0].chunk)
    files = sorted((path / "kv").rglob("*"))
    with DiskStore(path) as found, found.tables.write() as txn:
        header = decode_header(txn.get("headers", key.digest) or b"")
        assert isinstance(header, Header)
        txn.put("headers", key.digest, encode_header(replace(header, codec="later")))
    with DiskStore(path) as found:
        miss = found.get(key)
        assert isinstance(miss, Miss) and "'later' is unknown to this version" in miss.detail
    assert sorted((path / "kv").rglob("*")) == files


def test_another_model_has_a_basis_of_its_own(store: Path, tmp_path: Path) -> None:
    """Also one whose KV has another shape; and the first one finds its own again."""
    other = scene.save_model(tmp_path / "model")
    with opened(store) as cache:
        own = cache.engine.fingerprint.codec
    with opened(store, model=str(other)) as cache:
        assert cache.engine.fingerprint.codec.startswith("kvtc16:")
        assert cache.engine.fingerprint.codec != own
        cache.add(DOCUMENTS)
        assert not any(chunk.miss for chunk in cache.ask(QUESTION).report.chunks)
    with opened(store, model="tiny") as cache:
        assert cache.engine.fingerprint.codec == own
        assert not any(chunk.miss for chunk in cache.ask(QUESTION).report.chunks)


def test_a_level_that_is_named_once_is_not_the_default(store: Path) -> None:
    with opened(store) as cache:
        own = cache.engine.fingerprint.codec
    with opened(store, codec="kvtc8") as cache:
        assert cache.engine.fingerprint.codec == own.replace("kvtc16", "kvtc8")
    with opened(store) as cache:
        assert cache.engine.fingerprint.codec == own


def test_a_digest_that_is_named_must_be_there(store: Path) -> None:
    with pytest.raises(ConfigError, match="no store that is open has it"):
        opened(store, codec="kvtc16:0123456789abcdef")


def test_of_two_bases_the_recorded_one_is_used(store: Path, tmp_path: Path) -> None:
    with opened(store) as cache:
        own = cache.engine.fingerprint.codec
        [known] = bases_of(store)
        for number in range(4):  # some come before it by name
            changed = {n: step * (1 + (number + 1) / 1e6) for n, step in known.steps.items()}
            replace(known, steps=changed).write(store)
    for level in ("kvtc8", "kvtc16"):
        with opened(store, codec=level) as cache:
            assert cache.engine.fingerprint.codec == own.replace("kvtc16", level)


def test_damaged_bases_are_not_shared(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from ragcache.store.remote.bases import share_bases
    from ragcache.store.remote.object_store import Bucket

    (tmp_path / "remote" / FOLDER).mkdir(parents=True)
    bucket = Bucket(f"file://{tmp_path / 'remote'}")
    name = basis_files(made)[0].name
    bad = tmp_path / "bad" / FOLDER / "fedcba9876543210.basis"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"damaged")
    share_bases(bucket, tmp_path / "bad")
    assert bucket.list(FOLDER) == []
    (tmp_path / "remote" / FOLDER / name).write_bytes(b"damaged")
    share_bases(bucket, tmp_path / "bad")  # takes nothing
    assert [path.name for path in basis_files(tmp_path / "bad")] == [bad.name]
    share_bases(bucket, made)  # replaces it
    assert (tmp_path / "remote" / FOLDER / name).read_bytes() == basis_files(made)[0].read_bytes()
    share_bases(bucket, tmp_path / "bad")
    assert name in [path.name for path in basis_files(tmp_path / "bad")]
