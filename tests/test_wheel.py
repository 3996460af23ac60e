"""What users install: the wheel's contents, and the wheel in an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ragcache"
LINKS = ("api", "blend", "retriever", "store")

PROGRAM = """
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer
import ragcache

assert ragcache.RagCache.__module__ == "ragcache.pipeline"
tiny = str(files("ragcache.models") / "tiny")
tokenizer = AutoTokenizer.from_pretrained(tiny)
model = AutoModelForCausalLM.from_pretrained(tiny)
ids = tokenizer(ragcache.Chunk("page", 0, "What is stored?").text, return_tensors="pt").input_ids
print(model(ids).logits.isfinite().all().item(), ragcache.__file__)
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Output of a command that must succeed; without the caller's PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=kept | env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel made from it, of a copy of the tree.

    Of a copy, because a ``build/`` left in the tree would end up in the wheel.
    """
    top = tmp_path_factory.mktemp("dist")
    tree = top / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("ragcache", "tests", "examples", "bench", *LINKS):
        ignore = shutil.ignore_patterns("__pycache__")
        if (ROOT / name).is_symlink():
            (tree / name).symlink_to((ROOT / name).readlink())
        else:
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", top / "out", tree, cwd=top)
    return top / "out"


def shipped() -> set[str]:
    """What the package folder has for users: code, the typing marker, the page, the small model."""
    files = {path for path in PACKAGE.rglob("*") if path.is_file()}
    folders = PACKAGE / "models" / "tiny", PACKAGE / "api" / "static"
    data = {path for path in files if any(path.is_relative_to(folder) for folder in folders)}
    chosen = {path for path in files if path.suffix == ".py" or path.name == "py.typed"} | data
    return {path.relative_to(ROOT).as_posix() for path in chosen if path.suffix != ".pyc"}


def test_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == shipped()


def test_sdist_holds_the_package_once(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        paths = [PurePosixPath(member.name) for member in tar if member.isfile()]
        assert not any(member.issym() for member in tar)
    inside = {path.relative_to(path.parts[0]).as_posix() for path in paths}
    assert shipped() <= inside
    assert {name for name in inside if name.startswith("ragcache/")} == shipped()
    assert {name.split("/")[0] for name in inside}.isdisjoint(LINKS)


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    bin = tmp_path / "venv" / "bin"
    install = (bin / "python", "-m", "pip", "install", "--quiet", "--no-input")
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(*install, *constraints, "torch", cwd=empty)
    run(*install, *constraints, wheel, cwd=empty)

    assert "Usage" in run(bin / "ragcache", "--help", cwd=empty)
    assert "tiny" in run(bin / "ragcache", "models", cwd=empty)
    finite, file = run(bin / "python", "-c", PROGRAM, cwd=empty, HF_HUB_OFFLINE="1").split()
    assert finite == "True"
    assert Path(file).is_relative_to(tmp_path / "venv"), "it ran from the checkout"
