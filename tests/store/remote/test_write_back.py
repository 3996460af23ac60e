"""Writing back: one record, or one fault, does not block the others."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("obstore")

from ragcache.errors import RemoteError, StoreError
from ragcache.store.format.header import layer_checksum
from ragcache.store.remote import write_back as write_back
from ragcache.store.remote.store import RemoteStore
from tests.store.remotes import over
from tests.store.samples import make_key, make_kv
from tests.store.test_hostile import forged, not_finite

KEYS = [make_key(first) for first in range(40)]


def settled(store: RemoteStore, waiting: int = 0) -> None:
    until = time.monotonic() + 20
    while store.traffic.waiting > waiting and time.monotonic() < until:
        time.sleep(0.01)
    assert store.traffic.waiting == waiting


def test_a_record_that_no_level_can_hold_keeps_nothing_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with over(tmp_path / "one", remote_codecs=("int8",)) as store:
        with store.write_back._turn:
            for key in KEYS:
                store.put(key, make_kv(key))
            forged(store.disk, KEYS[7], not_finite)
        settled(store)
        assert store.write_back._thread.is_alive()
        traffic = store.traffic
        assert (traffic.sent, traffic.unsent) == (len(KEYS) - 1, 1)
    assert f"chunk {KEYS[7].digest.hex()[:12]} is not sent" in caplog.text
    with over(tmp_path / "one") as again:  # the disk was closed
        assert again.disk.has(KEYS[0])


def test_what_nobody_expected_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write_back, "_PAUSE_S", (0.01, 0.02))
    failures = [KeyError("a fault of ours"), MemoryError()]
    with over(tmp_path / "one") as store:
        real = store.disk.tables.read

        def read() -> object:
            if failures and threading.current_thread() is store.write_back._thread:
                raise failures.pop()
            return real()

        monkeypatch.setattr(store.disk.tables, "read", read)
        store.put(KEYS[0], make_kv(KEYS[0]))
        until = time.monotonic() + 20
        while failures and time.monotonic() < until:
            time.sleep(0.01)
        settled(store)
        assert store.write_back._thread.is_alive() and store.traffic.sent == 1
    assert "Traceback" in caplog.text and "a fault of ours" in caplog.text


def test_a_row_that_fails_keeps_no_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_back, "_AT_A_TIME", 4)
    monkeypatch.setattr(write_back, "_PAUSE_S", (60.0, 60.0))
    with over(tmp_path / "one") as store:
        store._patience_s = 0
        with store.write_back._turn:
            for key in KEYS:
                store.put(key, make_kv(key))
            first = sorted(KEYS, key=lambda key: key.content)[:6]
            for key in first:
                store.disk.delete(key)
            real = store.objects.delete

            def delete(content: bytes, digest: bytes | None = None) -> int:
                raise RemoteError("denied: look at who may delete")

            monkeypatch.setattr(store.objects, "delete", delete)
        settled(store, waiting=len(first))
        with pytest.raises(RemoteError, match="denied: look at who may delete"):
            store.write_back.flush()
        monkeypatch.setattr(store.objects, "delete", real)
        store.write_back.flush()
        assert store.traffic.waiting == 0


def test_closing_closes_the_disk_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = over(tmp_path / "one")
    store.put(KEYS[0], make_kv(KEYS[0]))

    def fails(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(store.write_back, "_carry", fails)
    monkeypatch.setattr(store._read_through, "close", fails)
    with pytest.raises(ZeroDivisionError):
        store.close()
    with pytest.raises(StoreError, match="is closed: open it again"):
        store.disk.get_header(KEYS[0])


def test_what_cannot_be_kept_is_logged_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.store.remote.test_store import fill, read

    with over(tmp_path / "one") as one, over(tmp_path / "two") as two:
        fill(one, KEYS[0])

        def fails(record: object) -> bool:
            raise ZeroDivisionError("a fault of ours")

        monkeypatch.setattr(two.disk, "put_record", fails)
        with caplog.at_level(logging.ERROR):
            read(two, KEYS[0])
            two._read_through.flush()
        assert two.traffic.not_kept == 1 and "a fault of ours" in caplog.text


def test_checksums_of_the_forgery_are_right(tmp_path: Path) -> None:
    """Else these tests would show what a checksum does."""
    with over(tmp_path / "one") as store:
        store.put(KEYS[0], make_kv(KEYS[0]))
        forged(store.disk, KEYS[0], not_finite)
        record = store.disk.record(KEYS[0].digest)
        raw = record.raws[1]  # type: ignore[union-attr]
        assert layer_checksum(KEYS[0].digest, 1, raw) == record.header.payloads[1].checksum  # type: ignore[union-attr]
        assert not torch.from_numpy(raw.copy()).view(torch.float32).isfinite().all()
