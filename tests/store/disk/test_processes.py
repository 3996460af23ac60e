"""Other processes and threads at a store: kills, forks, readers beside a writer."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ragcache.errors import StoreError
from ragcache.store import DiskStore
from tests.store.samples import CHUNK_BYTES, ONE, make_key, make_kv, same

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def process(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another Python, in which ``path`` and the samples are at hand."""
    head = (
        "import sys, pathlib\n"
        "from ragcache.errors import StoreError\n"
        "from ragcache.store import DiskStore\n"
        "from tests.store.samples import make_key, make_kv, same\n"
        f"path = pathlib.Path({str(path)!r})\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", head + code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


WRITER = """
store = DiskStore(path)
for first in range(int(sys.argv[1]) if sys.argv[1:] else 10**6):
    store.put(make_key(first), make_kv(make_key(first)))
    print(first, flush=True)
"""


def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "store"
    rng = random.Random(4)
    acknowledged = 0
    for _ in range(2):
        with process(path, WRITER) as child:
            assert child.stdout is not None
            acknowledged = int(child.stdout.readline())
            timer = threading.Timer(rng.uniform(0.01, 0.15), child.send_signal, [signal.SIGKILL])
            timer.start()
            for line in child.stdout:
                acknowledged = int(line) if line.endswith("\n") else acknowledged
            timer.join()
        with DiskStore(path) as store:
            assert store.verify() == {}
            for first in range(acknowledged + 1):
                assert same(store.get(make_key(first)), make_kv(make_key(first)))
            assert store.stats().payload_bytes == store.stats().chunks * CHUNK_BYTES


def test_a_reader_sees_whole_chunks_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with process(path, WRITER) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with DiskStore(path, readonly=True) as store:
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                stats = store.stats()
                assert stats.payload_bytes == stats.chunks * CHUNK_BYTES
                newest = make_key(stats.chunks - 1)
                assert same(store.get(newest), make_kv(newest))
            assert store.stats().chunks > 1


def test_replacing_is_atomic_for_readers(two: DiskStore) -> None:
    done = threading.Event()
    versions = [make_kv(ONE, seed) for seed in range(2)]

    def write() -> None:
        for turn in range(40):
            two.put(ONE, versions[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        found = two.get(ONE)
        assert any(same(found, version) for version in versions)
    writer.join()


def test_closing_waits_for_running_reads(two: DiskStore) -> None:
    def read() -> None:
        while True:
            try:
                two.layer(ONE, 0)
            except StoreError as error:
                assert "closed" in str(error)
                return

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    two.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


FORK = """
import os
store = DiskStore(path)
store.put(make_key(), make_kv(make_key()))
child = os.fork()
if not child:
    for use in (store.stats, lambda: store.put(make_key(), make_kv(make_key()))):
        try: use()
        except StoreError as error: print(error, flush=True)
    for readonly in (True, False):
        try: DiskStore(path, readonly=readonly)
        except StoreError as error: print(error, flush=True)
    store.close()
    del store
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
try: DiskStore(path)
except StoreError: print("still the writer", flush=True)
store.put(make_key(1), make_kv(make_key(1)))
assert store.verify() == {} and store.stats().chunks == 2
store.close()
DiskStore(path).close()
print("reopened")
"""


def test_fork(tmp_path: Path) -> None:
    with process(tmp_path / "store", FORK) as child:
        lines = child.communicate()[0].splitlines()
    assert child.returncode == 0
    assert [("cannot be used in its fork" in line) for line in lines[:2]] == [True, True]
    assert "or in the one that it was forked from" in lines[2]
    assert f"open for writing in process {child.pid}" in lines[3]
    assert lines[4:] == ["still the writer", "reopened"]


LIMITED = """
import resource
store = DiskStore(path)
store.put(make_key(), make_kv(make_key()))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
count = 1
try:
    while True:
        store.put(make_key(count), make_kv(make_key(count)))
        count += 1
except StoreError as error:
    print(error)
assert store.verify() == {} and store.stats().chunks == count
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.put(make_key(count), make_kv(make_key(count)))
assert store.verify() == {} and store.stats().chunks == count + 1
print("goes on")
"""


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    with process(tmp_path / "store", LIMITED) as child:
        lines = child.communicate()[0].splitlines()
    assert "what was committed before is intact" in lines[0]
    assert lines[1:] == ["goes on"]


def test_a_store_is_not_used_in_a_fork(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        store.put(ONE, make_kv(ONE))
        answers = multiprocessing.get_context("spawn").SimpleQueue()
        if (child := os.fork()) == 0:
            try:
                store.has(ONE)
            except StoreError as error:
                answers.put(str(error))
            os._exit(0)
        os.waitpid(child, 0)
        assert "start workers with the spawn method" in answers.get()
