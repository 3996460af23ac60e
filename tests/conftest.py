"""What every test may ask for. The environment is set here, before anything imports torch."""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ragcache.errors import RagCacheError
from tests.errors import MET

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if "XDG_STATE_HOME" not in os.environ:  # what the user has named is none of the tests' business
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="ragcache-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))  # torch's threads

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The small model that ships with the package."""
    path = ROOT / "ragcache" / "models" / "tiny"
    if not (path / "config.json").is_file():
        pytest.skip(f"no model in {path}: examples/train_tiny makes it")
    return path


@pytest.fixture(scope="session")
def learned_basis(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's folder with the basis of codec kvtc for the small model, which is also a user's
    cache that has it. It is learned once for all processes of the tests."""
    from ragcache.core.fit_basis import codec_with_basis
    from ragcache.engine.hf.engine import TransformersEngine

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "learned-basis"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        engine = TransformersEngine.load(str(tiny_model_dir), device="cpu", dtype="float32")
        codec_with_basis(engine, "kvtc16", folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    MET.watch(RagCacheError)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What is imported and collected stays to the end: garbage collection need not look at it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: a process is done, with what it met."""
    MET.places |= set(map(tuple, getattr(node, "workeroutput", {}).get("met", ())))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """All fast tests were run, and passed: were all error messages met?"""
    config, option = session.config, session.config.option
    if hasattr(config, "workeroutput"):  # one process of several: the first one asks
        config.workeroutput["met"] = list(MET.places)
        return
    everything = config.args == config.getini("testpaths")
    if (
        everything
        and not (option.keyword or option.collectonly or option.deselect)
        and not exitstatus
    ):
        missing = MET.missing()
        if option.markexpr == config.getini("addopts")[-1] and missing:
            print("\nno test meets these errors:", *missing, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
