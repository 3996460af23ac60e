"""Processes that convert the same GGUF file: one does, the others wait, and all may be killed."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ragcache.models import gguf
from ragcache.models.file_cache import user_folder

# Converts in no time, and says so; with an argument it stops half-way, and waits to be killed.
CHILD = """
import sys, time
from pathlib import Path
from ragcache.models import gguf

def convert(file, folder):
    print("converts", flush=True)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    if len(sys.argv) > 2:
        print("half", flush=True)
        time.sleep(600)
    (folder / "model.safetensors").write_bytes(b"whole")

gguf.convert_gguf = convert
print(gguf.converted_folder(Path(sys.argv[1])), flush=True)
"""

CONVERT = CHILD[CHILD.index("print(gguf") :]
REAL = "import sys\nfrom pathlib import Path\nfrom ragcache.models import gguf\n" + CONVERT


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF and more")
    return tmp_path / "x.gguf"


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def start(children: list[subprocess.Popen[str]], *given: str | Path) -> subprocess.Popen[str]:
    children.append(
        subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return children[-1]


def test_one_process_converts_and_the_others_wait(
    file: Path, children: list[subprocess.Popen[str]]
) -> None:
    folder = user_folder("XDG_CACHE_HOME") / "gguf" / gguf._key(file)
    folder.parent.mkdir(parents=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(3):
            start(children, file)
        for child in children:
            assert child.stderr is not None
            assert "waiting for another process that converts x.gguf" in child.stderr.readline()
    printed = [child.communicate(timeout=60) for child in children]
    assert sorted(out for out, _ in printed) == [f"{folder}\n"] * 2 + [f"converts\n{folder}\n"]
    assert [err for _, err in printed if "waiting" in err] == []  # it is said once
    assert (folder / "model.safetensors").read_bytes() == b"whole"


def test_what_a_killed_process_left_is_removed_by_the_next(
    file: Path, children: list[subprocess.Popen[str]]
) -> None:
    killed = start(children, file, "stop half-way")
    assert killed.stdout is not None
    assert [killed.stdout.readline() for _ in range(2)] == ["converts\n", "half\n"]
    waiting = start(children, file)
    assert waiting.stderr is not None
    assert "waiting for another process" in waiting.stderr.readline()
    cache = file.parent / "cache" / "ragcache" / "gguf"
    [part] = cache.glob("*.part")
    assert (part / "model.safetensors").read_bytes() == b"half"
    killed.kill()
    out, _ = waiting.communicate(timeout=60)
    assert out == f"converts\n{part.with_suffix('')}\n" and not part.exists()
    assert (part.with_suffix("") / "model.safetensors").read_bytes() == b"whole"


def test_a_process_that_has_imported_nothing_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_files = pytest.importorskip("tests.gguf_files")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf_files.write(tmp_path / "x.gguf")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "x.gguf")], capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 2), done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()


@pytest.mark.slow
def test_conversions_that_are_killed_at_any_time_leave_nothing_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[subprocess.Popen[str]]
) -> None:
    gguf_files = pytest.importorskip("tests.gguf_files")
    file = tmp_path / "x.gguf"
    gguf_files.write(file, vocab_size=200_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reference"))
    expected = _digests(gguf.converted_folder(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for delay in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5):
        child = subprocess.Popen(
            [sys.executable, "-c", REAL, str(file)], stderr=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stderr is not None
        child.stderr.readline()  # it begins
        time.sleep(delay)
        child.kill()
        child.wait()
        for made in (tmp_path / "cache" / "ragcache" / "gguf").iterdir():
            if made.suffix == "" and made.is_dir():
                assert _digests(made) == expected
    assert _digests(gguf.converted_folder(file)) == expected


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
