"""kill -9, concurrent readers, a full disk, faults and flips, in runs of ``bench.reliability``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.reliability.refuse import possible
from bench.reliability.samples import put, unsound
from ragcache.store import DiskStore
from tests.conftest import ROOT


def reliability(*names: str, size: str = "--short") -> str:
    """What these experiments print; in a process of their own, which forks."""
    command = [sys.executable, "-m", "bench.reliability", *names, size]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("size", ["--short", pytest.param("--rounds=10", marks=pytest.mark.slow)])
def test_nothing_that_was_acknowledged_is_lost_and_faults_are_typed_errors(size: str) -> None:
    told = reliability("kills", "corpus", "crowd", "space", "faults", "flips", size=size)
    assert re.search(r"killed in: \w+", told) and re.search(r"gets: .*\bright \d{2}", told)
    assert re.search(r"(\d{3,}) chunks in the end, \1 of them bit-equal", told)
    assert re.search(r"layer records: miss: corrupt \d+\n", told)
    if possible():
        assert "ENOSPC: put StoreError" in told  # it did happen


def test_the_oracle_sees_what_is_wrong(tmp_path: Path) -> None:
    with DiskStore(tmp_path, layout="files") as store:
        put(store, 0, 1)
        put(store, 1, 1)
    assert unsound(tmp_path, {0: {1}, 1: {0, 1}, 2: {None}}) == []
    (tmp_path / "stray").write_text("")
    expected: dict[int, set[int | None]] = {0: {2}, 1: {None}, 2: {1}}
    assert unsound(tmp_path, expected) == [
        "left over: stray",
        "an acknowledged put is undone, or a version is served that was not put yet",
        "an acknowledged delete is undone",
        "an acknowledged chunk is lost",
    ]
    assert expected == {0: {1}, 1: {1}, 2: {None}}
    (file,) = [p for p in (tmp_path / "kv").rglob("*-*") if p.stat().st_size < 20_000]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert [w.split(":")[0] for w in unsound(tmp_path, {0: {1}})] == [
        "verify",
        "left over",
        "a chunk that nobody damaged is corrupt",
    ]
