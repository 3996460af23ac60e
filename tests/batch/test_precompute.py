"""``ragcache precompute``: its output, what it stores, and its exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ragcache.batch import run as run_module
from ragcache.batch.ray import RayCluster, compute_on_ray
from ragcache.core import precompute as core
from ragcache.types import KVSpec
from tests import scene
from tests.batch.stores import contents
from tests.cli.test_commands import Run, model, notes, run

__all__ = ["model", "notes", "run"]  # fixtures


def test_plan_run_and_run_again(run: Run, notes: Path, model: Path) -> None:
    code, out, _ = run("precompute", notes, "--model", model, "--dry-run")
    assert code == 0 and "3 documents: 9 chunks" in out and "9 to compute" in out
    assert "FLOPs, about" in out and not Path("ragcache-store").exists()
    asked = ("precompute", notes, "--report", "r.json")
    code, out, err = run(*asked, "--model", model)
    assert code == 0 and "KV of 9 chunks computed" in out and "9 of 9" not in err  # no terminal
    told = json.loads(Path("r.json").read_text())
    assert told["state"] == "done" and told["computed"] == told["missing"] == told["wanted"]
    assert told["expected_s"] > 0 and told["skipped"] == []
    before = contents(Path("ragcache-store"))
    code, out, _ = run(*asked)
    assert code == 0 and "9 of them are there; 0 to compute" in out
    told = json.loads(Path("r.json").read_text())
    assert told["stored"] == told["wanted"] and told["computed"]["chunks"] == 0
    assert contents(Path("ragcache-store")) == before and len(before) == 9
    code, out, _ = run("index", notes)
    assert code == 0 and "KV of 0 chunks computed" in out and "9 were there" in out


def test_parts_come_to_the_whole(run: Run, notes: Path, model: Path) -> None:
    asked = ("precompute", notes, "--batch-tokens", 30, "--model", model)
    run(*asked)
    for part in ("1/2", "2/2"):
        code, out, _ = run(*asked, "--store", "parts", "--shard", part)
        assert code == 0 and f"shard {part}" in out
    code, out, _ = run(*asked, "--store", "limited", "--limit", 1)
    assert code == 0 and " are left: run it again (limited)" in out
    run(*asked, "--store", "limited")
    whole = contents(Path("ragcache-store"))
    assert contents(Path("parts")) == contents(Path("limited")) == whole


def test_a_document_without_text_is_named(run: Run, notes: Path, model: Path) -> None:
    (notes / "blank.md").write_text("\n")
    code, out, err = run("precompute", notes, "--model", model)
    assert code == 0 and "blank.md: it has no chunks" in err and "KV of 9 chunks computed" in out


def test_a_bad_document_is_skipped_and_told(run: Run, notes: Path, model: Path) -> None:
    (notes / "broken.pdf").write_bytes(b"%PDF-1.7\nnot a pdf at all")
    code, out, err = run("precompute", notes, "--model", model, "--report", "r.json")
    assert code == 3 and "skipped: " in err and "KV of 9 chunks computed" in out
    assert "broken.pdf" in json.loads(Path("r.json").read_text())["skipped"][0]


def test_from_standard_input(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(json.dumps({"page_content": d.text}) for d in scene.DOCUMENTS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code, out, _ = run("precompute", "-", "--model", model)
    assert code == 0 and "3 documents: 9 chunks" in out


def test_interrupted(run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = core.compute_batch, list[int]()

    def stops(*args: object) -> object:
        calls.append(0)
        if len(calls) > 3:  # two to see how fast it is
            raise KeyboardInterrupt
        return compute(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "compute_batch", stops)
        code, out, _ = run("precompute", notes, "--model", model, "--report", "r.json")
    assert code == 130 and "are left: run it again (interrupted)" in out
    told = json.loads(Path("r.json").read_text())
    assert told["state"] == "interrupted" and 0 < told["computed"]["chunks"] < 9
    code, out, _ = run("precompute", notes)
    assert code == 0 and f"{told['computed']['chunks']} of them are there" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.txt"], "missing.txt does not exist"),
        (["notes", "--shard", "3/2"], "shard 3/2 is invalid"),
        (["notes", "--report", "no/r.json"], "there is no folder no"),
        (
            ["notes", "--encoding-context", "enriched(2)"],
            "encoding context enriched(2) no longer exists",
        ),
    ],
)
def test_what_cannot_be(run: Run, notes: Path, model: Path, args: list[str], message: str) -> None:
    code, out, err = run("precompute", *args, "--model", model)
    assert code in (1, 3) and message in err and "Traceback" not in err


def test_a_corpus_beyond_the_quota_is_refused(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGCACHE_MAX_BYTES", "20kB")
    code, _, err = run("precompute", notes, "--model", model)
    assert code == 1 and "the corpus needs" in err and "choose a smaller codec" in err


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from ragcache.errors import ConfigError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "ragcache-fusion\[ray\]"'):
        compute_on_ray(
            RayCluster(),
            model="",
            options={},
            fingerprint=None,  # type: ignore[arg-type]
            spec=KVSpec(1, 1, 1, "float32"),
            batch_tokens=1,
        )
