"""FAISS against the plain index, by value; unusable files are refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import NumpyIndex, VectorIndex
from ragcache.testing.index import DIMENSION, VectorIndexTests, assert_same, filled


class TestNumpyIndex(VectorIndexTests):
    kind = NumpyIndex


class TestFaissIndex(VectorIndexTests):
    kind = FaissIndex


def test_files_of_another_kind_or_layout_say_so(kind: type[VectorIndex], tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    filled(kind).save(path, 5)
    other = FaissIndex if kind is NumpyIndex else NumpyIndex
    assert other.load(path, dimension=DIMENSION, generation=5)[1].startswith("it is of kind")
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + struct.pack("<H", 2) + whole[10:])
    found = kind.load(path, dimension=DIMENSION, generation=5)
    assert found == (None, "it has layout 2, not 1")


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyIndex, "_BLOCK", 7)
    assert_same(filled(FaissIndex), filled(NumpyIndex))


def test_payload_that_lies_under_a_right_checksum(
    kind: type[VectorIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors"
    filled(kind, 3).save(path, 5)
    for payload in (b"", b"junk" * 20, path.read_bytes()[48:]):
        index = filled(kind)
        monkeypatch.setattr(index, "_write", lambda file, payload=payload: file.write(payload))
        index.save(path, 5)
        found, reason = kind.load(path, dimension=DIMENSION, generation=5)
        assert found is None and reason == "its payload is not what it says"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(
    kind: type[VectorIndex], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors"
    filled(kind).save(path, 1)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        filled(kind, 7).save(path, 2)
    assert os.listdir(tmp_path) == ["vectors"]
    kept, _ = kind.load(path, dimension=DIMENSION, generation=1)
    assert kept is not None and len(kept) == 50


def test_save_makes_file_and_folder_durable_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note_replace(source: str, target: Path) -> None:
        steps.append("replace")
        replace(source, target)

    def note_fsync(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "fsync", note_fsync)
    filled(NumpyIndex).save(tmp_path / "vectors", 1)
    assert steps == ["file", "replace", "folder"]
