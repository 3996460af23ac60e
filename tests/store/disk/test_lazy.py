"""Questions while another process writes the store: answered, not stored, and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ragcache import RagCache, cli, setup
from ragcache.errors import LockedError, StoreError
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store import Catalog, DiskStore
from ragcache.store.disk.quota import Quota
from ragcache.types import Document, Sampling
from tests import models, scene
from tests.store.disk.test_processes import process
from tests.store.samples import ONE, TWO, make_kv, same

HOLDER = """
store = DiskStore(path)
print("holds", flush=True)
for line in sys.stdin:
    exec(line)
    print("did", flush=True)
"""
Do = Callable[[str], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of three documents, closed."""
    with scene.small(tmp_path / "store") as cache:
        cache.add(scene.DOCUMENTS)
        cache.catalog.put_document(
            Document("old", "It is over."),
            [],
            cache.retriever.embedder.embed(["x"])[:0],
            b"",
        )
    return tmp_path / "store"


@pytest.fixture
def holder(path: Path) -> Iterator[tuple[int, Do]]:
    """Another process that writes it, and what has it do something."""
    with process(path, HOLDER) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "holds\n"

        def do(line: str) -> None:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "did\n"

        yield child.pid, do


def small(path: Path, **options: object) -> RagCache:
    store = DiskStore(path, lazy=True)
    settings = Settings(max_tokens=4, top_k=2, ratio=0.15, **options)  # type: ignore[arg-type]
    return RagCache(models.engine("llama"), store, HashEmbedder(), path, settings)


def test_a_question_is_answered_and_nothing_is_stored(path: Path, holder: tuple[int, Do]) -> None:
    pid, do = holder
    with small(path) as cache:
        answer = cache.ask("Who keeps a parrot?")
        assert answer.report.fallbacks == () and answer.report.reused_tokens > 0
        do("store.delete")  # is still the writer
        missing = cache.ask("Who?", chunks=["No one has ever heard of this before."])
        *_, note = missing.report.fallbacks
        assert note.startswith("nothing is stored for next time, though 1 chunks were missing: ")
        assert f"is open for writing in process {pid} since 20" in note
        assert cache.store.stats().misses["absent"] == 1
        with pytest.raises(LockedError, match="one process writes at a time"):
            cache.add([Document("new", "Something new.")])
    with DiskStore(path, readonly=True) as store:
        assert len(Catalog(store).entries()) == 4 and store.verify() == {}


def test_two_may_ask_at_once_and_then_one_writes(path: Path) -> None:
    with small(path) as cache:
        with process(path, "DiskStore(path, lazy=True)\nprint('opened', flush=True)") as other:
            assert other.stdout is not None and other.stdout.readline() == "opened\n"
        asked = cache.ask("Who?", chunks=["No one has ever heard of this before."])
        assert cache.store.tables.is_writer
        assert not any("next time" in note for note in asked.report.fallbacks)
        again = cache.ask("Who?", chunks=["No one has ever heard of this before."])
        assert all(chunk.miss is None for chunk in again.report.chunks)


def test_overlapping_chunks_are_encoded_without_being_stored(
    path: Path, holder: tuple[int, Do]
) -> None:
    with small(path) as cache:
        before = cache.store.stats().chunks
        answer = cache.ask("Who?", mode="ape", chunks=["Nobody knows this.", "Nor that."])
        assert any("not stored for next time" in note for note in answer.report.fallbacks)
        assert cache.store.stats().chunks == before


def test_what_the_writer_does_is_seen(path: Path, holder: tuple[int, Do]) -> None:
    _, do = holder
    with small(path) as cache:
        assert cache.ask("Who keeps a parrot?").passages
        do("store.compact()")
        assert cache.ask("Who keeps a parrot?").passages
        do("from ragcache.store import Catalog; Catalog(store).delete_document('holt')")
        found = cache.retrieve("Who keeps a parrot?")
        assert found and all(passage.chunk.document != "holt" for passage in found)


def test_documents_whose_time_is_over_are_left_out(path: Path, holder: tuple[int, Do]) -> None:
    _, do = holder
    with small(path) as cache:
        assert (
            cache.retrieve("Who keeps a parrot?", top_k=1, neighbours=0)[0].chunk.document == "holt"
        )
        do("from ragcache.store import Catalog; Catalog(store).set_retention('holt', expires=1.0)")
        found = cache.retrieve("Who keeps a parrot?", top_k=5, neighbours=0)
        assert found and all(passage.chunk.document != "holt" for passage in found)
        assert "holt" not in [entry.id for entry in cache.documents()]
        assert "holt" in [entry.id for entry in cache.catalog.entries()]


def test_uses_are_written_down_where_that_can_be(tmp_path: Path) -> None:
    path, quota = tmp_path / "store", Quota(1 << 30)
    with DiskStore(path, quota=quota) as store:
        store.put(ONE, make_kv(ONE))
        store.put(TWO, make_kv(TWO))
    with DiskStore(path, quota=quota, lazy=True) as lazy:
        lazy.get_header(ONE)
        assert not lazy.tables.is_writer
    with DiskStore(path, quota=quota) as store:
        capacity = store._capacity
        assert capacity is not None
        assert capacity._of("").held(ONE.digest).use.times == 2
        assert capacity._of("").held(TWO.digest).use.times == 1


def test_a_lazy_store_puts_and_evicts_like_any(tmp_path: Path) -> None:
    path, quota = tmp_path / "store", Quota(make_kv(ONE).spec.chunk_bytes(5))
    with DiskStore(path, quota=quota, layout="files") as store:
        store.put(ONE, make_kv(ONE))
    with DiskStore(path, quota=quota, layout="files", lazy=True) as lazy:
        lazy.put(TWO, make_kv(TWO))
        assert same(lazy.get(TWO), make_kv(TWO)) and not lazy.has(ONE)
        assert lazy.stats().evictions == 1 and lazy.verify() == {}


def test_a_lazy_store_is_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store in"):
        DiskStore(tmp_path / "store", lazy=True)
    assert not (tmp_path / "store").exists()


def test_a_closed_lazy_store_claims_nothing(path: Path) -> None:
    store = DiskStore(path, lazy=True)
    store.close()
    with pytest.raises(StoreError, match="is closed: open it again"):
        store.delete(ONE)
    DiskStore(path).close()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_store_that_may_only_be_read_answers(path: Path) -> None:
    for file in path.iterdir():
        file.chmod(0o400 if file.is_file() else 0o500)
    with DiskStore(path, lazy=True) as store:
        assert store.refusal() is not None


def test_commands_beside_a_writer(
    path: Path,
    holder: tuple[int, Do],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pid, _ = holder
    monkeypatch.setattr(setup, "load_embedder", lambda *_: HashEmbedder())
    model = scene.save_model(tmp_path / "llama")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ragcache", *map(str, args), "--store", str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    notes = tmp_path / "notes.txt"
    notes.write_text("Something new.")
    reading: list[tuple[object, ...]] = [
        ("query", "Who keeps a parrot?", "--model", model, "--max-tokens", 2),
        ("documents",),
        ("stats",),
        ("verify",),
        ("doctor", "--model", model),
        ("profile", "--model", model),
    ]
    for args in reading:
        code, out, err = run(*args)
        assert code == 0, (args, out, err)
    writing: list[tuple[object, ...]] = [
        ("index", notes),
        ("delete", "holt"),
        ("compact",),
        ("convert", "files"),
        ("serve",),
        ("verify", "--repair"),
    ]
    for args in writing:
        began = time.monotonic()
        code, _, err = run(*args)
        assert code == 1 and f"process {pid} since" in err, (args, err)
        assert time.monotonic() - began < 3, args


def test_a_note_of_what_cannot_be_stored_is_no_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say: the answer is there."""
    with small(path) as cache:

        def full(*_: object, **__: object) -> None:
            raise StoreError("the disk is full: free some space")

        monkeypatch.setattr(cache.store, "put_all", full)
        stream = cache.stream("Who?", chunks=["Nobody."], sampling=Sampling(max_tokens=2))
        assert "the disk is full" in stream.answer.report.fallbacks[-1]


def test_it_is_refused_at_once(path: Path, holder: tuple[int, Do]) -> None:
    pid, _ = holder
    began = time.monotonic()
    with pytest.raises(LockedError, match=f"process {pid} since"):
        DiskStore(path)
    assert time.monotonic() - began < 1.5


@pytest.mark.slow  # two processes that load a model
def test_a_service_and_a_question(path: Path, tmp_path: Path) -> None:
    """The very commands: a question beside ``ragcache serve``."""
    code = (
        "import sys, pathlib\n"
        "from ragcache import setup\n"
        "from ragcache.retriever.embed import HashEmbedder\n"
        "setup.load_embedder = lambda *_: HashEmbedder()\n"
        "from ragcache.cli import main\n"
        "main()\n"
    )
    model = scene.save_model(tmp_path / "llama")
    serve = [sys.executable, "-c", code, "serve", "--store", str(path), "--model", str(model)]
    with subprocess.Popen(
        [*serve, "--port", "0"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            for _ in range(600):
                with DiskStore(path, lazy=True) as probe:
                    if probe.refusal() is not None:
                        break
                time.sleep(0.1)
            ask = [sys.executable, "-c", code, "query", "Who keeps a parrot?", "--max-tokens", "8"]
            done = subprocess.run(
                [*ask, "--store", str(path), "--model", str(model)],
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
            assert server.poll() is None
        finally:
            server.terminate()
            server.communicate(timeout=60)
