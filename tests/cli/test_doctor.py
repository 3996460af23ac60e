"""The problems that the doctor reports, and its advice."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import faiss
import pytest
import torch

from ragcache.cli import doctor
from ragcache.cli.doctor import Finding, inspect_store
from ragcache.engine.base import Engine
from ragcache.store import DiskStore
from tests import models
from tests.store.samples import ONE, make_key, make_kv


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskStore]:
    monkeypatch.setattr(doctor, "_PROBE_BYTES", 1 << 20)
    with DiskStore(tmp_path / "store", layout="records") as store:
        store.put(ONE, make_kv(ONE))
        yield store


def found(store: DiskStore, what: str, engine: Engine | None = None) -> Finding:
    return next(finding for finding in inspect_store(store, engine) if finding.what == what)


def test_a_healthy_store(store: DiskStore) -> None:
    states = {f.what: f.state for f in inspect_store(store)}
    assert "bad" not in states.values()
    assert {"file system", "disk speed", "LMDB map", "unused", "readers", "faiss"} <= set(states)
    assert found(store, "kernels", models.engine()).detail == "torch, on a CPU"
    assert "writer.probe" not in {path.name for path in store.tables.path.iterdir()}


def test_a_network_file_system_is_bad(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_mount", lambda path: "nfs4")
    finding = found(store, "file system")
    assert finding.state == "bad" and "needs a local disk; move the store" in finding.detail


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_little_space_and_a_full_map_are_told(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 1 << 20))
    assert found(store, "free space").state == "look"
    monkeypatch.setattr(store.tables, "map_size", store.tables.file.stat().st_size)
    assert "open it with a larger map_size" in found(store, "LMDB map").detail


def test_a_disk_that_cannot_be_written_is_bad(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", fails)
    finding = found(store, "disk speed")
    assert finding.state == "bad" and "No space left on device" in finding.detail


def test_waste_is_told_with_the_command(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "is_wasteful", lambda: True)
    assert "`ragcache compact` frees it" in found(store, "unused").detail


def test_a_reader_that_stays_is_named(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with store.tables.read():
        store.tables.long_readers()
        monkeypatch.setattr(time, "monotonic", lambda: now + 45)
        finding = found(store, "readers")
    assert finding.state == "look" and "for 4" in finding.detail


def test_strays_are_worth_a_look(store: DiskStore) -> None:
    folder = store.tables.path / "kv"
    folder.mkdir(exist_ok=True)
    (folder / ".DS_Store").write_text("not ours")
    finding = next(f for f in inspect_store(store) if f.what == "strays")
    assert finding.state == "look" and ".DS_Store" in finding.detail


def test_a_store_of_another_model_is_bad(store: DiskStore) -> None:
    engine = models.engine("llama")
    finding = next(f for f in inspect_store(store, engine) if f.what == "model")
    assert finding.state == "bad" and "can use 0 of 1 chunks: they are for tiny@" in finding.detail
    shapeless = replace(engine.fingerprint, spec=None)
    store.put(mine := make_key(3, shapeless), make_kv(mine))
    finding = next(f for f in inspect_store(store, engine) if f.what == "model")
    assert finding.state == "good" and "can use 1 of 2 chunks" in finding.detail


def test_which_faiss_is_installed_is_told(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = found(store, "faiss")
    assert finding.state == "good" and re.fullmatch(r"faiss-\w+ [\d.]+, \d+ GPUs", finding.detail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    assert "sees no GPU: the CPU searches" in found(store, "faiss").detail
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    assert found(store, "faiss").detail.endswith(", 2 GPUs")
    versions = {"faiss-cpu": "1.15.1", "faiss-gpu-cu12": "1.14.1"}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    finding = found(store, "faiss")
    assert finding.state == "look"
    assert "faiss-cpu 1.15.1 and faiss-gpu-cu12 1.14.1 are installed" in finding.detail
