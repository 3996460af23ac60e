"""The wheel: contents and size, and installations into an empty environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ragcache"
LINKS = ("api", "blend", "retriever", "store")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [name for name in PROJECT["optional-dependencies"] if name != "dev"]


def newer() -> Iterator[Path]:
    """Newer Pythons that are at hand; the shims of pyenv run only where one was chosen."""
    for minor in range(sys.version_info.minor + 1, 20):
        name = f"python3.{minor}"
        of_pyenv = Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}")
        found = [*of_pyenv, *map(Path, filter(None, [shutil.which(name)]))]
        yield from [path for path in found if path.parent.name != "shims"][:1]


#: The oldest that is supported, which the tests run with, and newer ones.
PYTHONS = [Path(sys.executable), *newer()]

PROGRAM = """
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer
import ragcache

assert ragcache.RagCache.__module__ == "ragcache.rag"
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
    """What the package folder has for users: code, the typing marker, the page, the small model,
    the demo's articles."""
    files = {path for path in PACKAGE.rglob("*") if path.is_file()}
    folders = [PACKAGE / path for path in ("models/tiny", "api/static", "models/articles")]
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


def test_the_wheel_is_as_large_as_the_readme_says(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (said,) = re.findall(r"The wheel is ([0-9.]+) MB", (ROOT / "README.md").read_text("utf-8"))
    assert float(said) == pytest.approx(wheel.stat().st_size / 1e6, abs=0.15)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: path.name)
def test_it_works_in_an_empty_environment(
    dist: Path, empty: Path, tmp_path: Path, python: Path, kind: str
) -> None:
    """And every extra can be installed beside it, without the others."""
    (built,) = dist.glob(kind)
    run(python, "-m", "venv", tmp_path / "venv", cwd=empty)
    bin = tmp_path / "venv" / "bin"
    install = (bin / "python", "-m", "pip", "install", "--quiet", "--no-input")
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(*install, *constraints, "torch", cwd=empty)
    run(*install, *constraints, built, cwd=empty)

    assert "Usage" in run(bin / "ragcache", "--help", cwd=empty)
    assert "tiny" in run(bin / "ragcache", "models", cwd=empty)
    finite, file = run(bin / "python", "-c", PROGRAM, cwd=empty, HF_HUB_OFFLINE="1").split()
    assert finite == "True"
    assert Path(file).is_relative_to(tmp_path / "venv"), "it ran from the checkout"
    for extra in EXTRAS:
        run(*install, "--dry-run", *constraints, f"{built}[{extra}]", cwd=empty)
