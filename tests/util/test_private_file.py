"""Files that hold texts are for their owner only, whatever the umask."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ragcache.api import batch_file, report_page
from ragcache.store.remote.folder_store import FolderStore
from ragcache.util.private_file import open_private
from tests import scene


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    umask = os.umask(0)
    yield
    os.umask(umask)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_reports_and_results(tmp_path: Path) -> None:
    questions, results = tmp_path / "questions.jsonl", tmp_path / "results.jsonl"
    questions.write_text(json.dumps({"question": "Who keeps a parrot?"}) + "\n")
    with scene.small(tmp_path / "store") as cache:
        cache.add(scene.DOCUMENTS)
        answer = cache.ask("Who keeps a parrot?")
        report_page.write_report(tmp_path / "report.html", {"Who?": {"fused": answer}}, cache)
        part = results.with_name("results.jsonl.part")
        seen = []
        for _ in batch_file.iter_answer_batch(cache, batch_file.read_batch(questions), results):
            seen.append(mode(part))
        assert set(seen) == {0o600}
    assert mode(tmp_path / "report.html") == mode(results) == 0o600
    store = tmp_path / "store"
    assert {mode(each) for each in store.rglob("*") if each.is_file()} == {0o600}


def test_a_file_that_is_there_becomes_its_owners_alone(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.write_text("old and longer")
    shared.chmod(0o640)
    with open_private(shared, "wb") as file:
        file.write(b"new")
    assert shared.read_text() == "new" and mode(shared) == 0o600
    with open_private(Path(os.devnull), "wb") as file:
        file.write(b"gone")
    assert mode(Path(os.devnull)) == 0o666
    with open_private(tmp_path / "fresh", "xb"), pytest.raises(FileExistsError):
        open_private(tmp_path / "fresh", "xb")
    assert mode(tmp_path / "fresh") == 0o600


def test_objects_in_a_folder(tmp_path: Path) -> None:
    folder = FolderStore(tmp_path / "remote")
    assert folder.write("chunks/aa/bb", b"KV", replacing=False)
    assert not folder.write("chunks/aa/bb", b"other", replacing=False)
    assert folder.read("chunks/aa/bb", 0, 99).data == b"KV"
    assert folder.list("chunks") == [("chunks/aa/bb", 2)] and folder.list("nowhere") == []
    assert mode(tmp_path / "remote" / "chunks" / "aa" / "bb") == 0o600
    assert mode(tmp_path / "remote" / "chunks") == mode(tmp_path / "remote") == 0o700
    assert [each.name for each in (tmp_path / "remote" / "chunks" / "aa").iterdir()] == ["bb"]
