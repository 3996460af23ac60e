"""What a store keeps when the power fails: a short run of ``python -m bench.powerloss``."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.powerloss.disk import DEAF, Disk, File
from bench.powerloss.recording import Op, RecordingError, compiler, record
from bench.powerloss.replay import Recording, Rules, replay
from bench.powerloss.run import outcomes
from bench.powerloss.workload import Step, plan

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C compiler, and Linux")
KINDS = ("open", "put", "delete", "document", "forget", "convert", "compact")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Of 50 steps, the last of them a ``scratch``."""
    folder = tmp_path_factory.mktemp("powerloss")
    record(folder, [*plan(1, 49, without=("scratch",)), Step("scratch")])
    return Recording(folder)


def write(at: int, data: bytes, *, durable: bool = False) -> Op:
    return Op("w", 1, at, durable, data, "")


def left(pending: list[Op], sure: bytes = b"") -> set[bytes]:
    """All that such a file may hold after a power loss."""
    file = File("data.mdb", bytearray(sure), pending)
    return {file.crashed(random.Random(seed)) for seed in range(300)}


def test_what_is_synced_stays_and_the_rest_may_go() -> None:
    old, new = b"o" * 512, b"n" * 512
    assert left([], old) == {old}
    assert left([write(0, new)], old) == {old, new}
    both = {old + old, new + old, old + new, new + new}
    assert left([write(0, new + new)], old + old) == both
    assert left([write(0, new), write(512, new, durable=True)], old + old) == {old + new, new + new}
    assert left([write(0, b"ab"), write(0, b"c")], b"..") == {b"..", b"ab", b"cb", b"c."}
    assert left([Op("t", 1, 2, False, b"", "")], b"abcd") == {b"abcd", b"ab"}
    assert left([write(0, b"x")]) == {b"", b"\0", b"x"}  # the size may be there without the data


def test_names_are_sure_once_their_folder_is_synced() -> None:
    disk = Disk()
    for kind, node, path, target in (
        ("d", 1, "a", ""),
        ("c", 2, "a/old", ""),
        ("w", 2, "data", ""),
        ("s", 2, "", ""),
        ("r", 0, "a/old", "a/new"),
    ):
        disk.apply(Op(kind, node, 0, False, path.encode(), target))
    seen = {frozenset(disk.crashed(random.Random(seed)).items()) for seed in range(300)}
    folder = ("a", None)
    there = [set(tree) - {folder} for tree in seen if folder in tree]
    assert frozenset() in seen and len(seen) == 4
    assert sorted(map(sorted, there)) == [[], [("a/new", b"data")], [("a/old", b"data")]]
    assert disk.now() == {"a": None, "a/new": b"data"}


@needs_compiler
def test_nothing_that_was_acknowledged_is_lost(recording: Recording, tmp_path: Path) -> None:
    recording.check_complete()
    assert recording.count("s") > 100
    rules, room = Rules(during=KINDS), tmp_path / "room"
    seen = [replay(recording, number, rules, room) for number in range(15)]
    assert [outcome for outcome in seen if not outcome.is_good] == []
    assert sum(outcome.checked for outcome in seen) > 50


@needs_compiler
@pytest.mark.slow
def test_another_process_sees_the_same(recording: Recording, tmp_path: Path) -> None:
    rules = Rules(deaf=("files",))
    seen = list(outcomes(recording.folder, rules, range(8)))
    for number, outcome in enumerate(seen):
        here = replay(recording, number, rules, tmp_path / "room")
        assert (outcome.cut, outcome.lost) == (here.cut, here.lost)
    assert len(seen) == 8


@needs_compiler
@pytest.mark.parametrize("deaf", DEAF)
def test_a_disk_that_ignores_syncs_is_found_out(
    recording: Recording, tmp_path: Path, deaf: str
) -> None:
    rules = Rules(deaf=(deaf,), during=("put", "convert"))
    seen = (replay(recording, number, rules, tmp_path / "room") for number in range(20))
    assert any(outcome.lost or "does not open" in "".join(outcome.wrong) for outcome in seen)


@needs_compiler
def test_a_value_that_was_replaced_is_found_out(recording: Recording, tmp_path: Path) -> None:
    older = Recording(recording.folder)
    older.steps = [replace(s, version=s.version + (s.kind == "put")) for s in older.steps]
    outcome = replay(older, 0, Rules(), tmp_path / "room", cut=len(older.ops))
    assert outcome.opened and "KV that was never put" in "".join(outcome.wrong)


@needs_compiler
def test_a_log_with_a_hole_is_refused(recording: Recording) -> None:
    holed = Recording(recording.folder)
    holed.ops = [op for op in holed.ops if not op.durable]
    with pytest.raises(RecordingError, match="files are not what the log says"):
        holed.check_complete()


# What is known to be lost so far.


@needs_compiler
def test_a_commit_that_leaves_its_last_pages_unwritten(
    recording: Recording, tmp_path: Path
) -> None:
    _, end = recording.bounds[-1]
    room = tmp_path / "room"
    seen = [replay(recording, n, Rules(), room, end - n % 2) for n in range(8)]
    assert all(outcome.is_good for outcome in seen)


@needs_compiler
def test_compaction_names_a_folder_that_is_there(recording: Recording) -> None:
    renamed = [n for n, op in enumerate(recording.ops) if op.target.endswith("/CURRENT")]
    disk = recording.disk(renamed[0] + 1, Rules())
    for seed in range(100):
        tree = disk.crashed(random.Random(seed))
        current = tree.get("store/CURRENT")
        assert current is None or f"store/{current.split()[0].decode()}/data.mdb" in tree


@needs_compiler
def test_a_store_that_was_opened_is_there(recording: Recording) -> None:
    _, end = recording.bounds[0]
    disk = recording.disk(end + 1, Rules())
    trees = [disk.crashed(random.Random(seed)) for seed in range(100)]
    assert all("store/data.mdb" in tree for tree in trees)
