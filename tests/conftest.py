"""What every test may ask for. The environment is set here, before anything imports torch."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
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


def pytest_configure(config: pytest.Config) -> None:
    MET.watch(RagCacheError)


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
