"""Workers on Ray: the store equals that of a local run bit for bit, even if workers die.

Ray has an environment of its own: ``make test-ray``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ragcache.batch import ray as module
from ragcache.batch.plan import make_plan
from ragcache.batch.ray import RayCluster, compute_on_ray
from ragcache.batch.run import BatchComputer, compute_locally, run
from ragcache.core.precompute import Batch
from ragcache.errors import ModelError, RagCacheError
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.types import Document, Fingerprint, Tokens
from tests import models, scene
from tests.batch.stores import contents
from tests.conftest import ROOT

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

EXAMPLE = ROOT / "examples" / "precompute" / "ray.sh"
DOCUMENTS = [
    Document(f"d{i}", " ".join(f"Mira keeps {i * n} parrots." for n in range(1 + i % 5)))
    for i in range(60)
]
TOKENS = 96  # of a batch


def opened(path: Path) -> RagCache:
    return scene.small(path)


def workers(cache: RagCache, model: Path, fingerprint: Fingerprint | None = None) -> BatchComputer:
    return compute_on_ray(
        RayCluster(workers=2),
        model=str(model),
        options={"device": "cpu", "dtype": "float32", "codec": "raw"},
        fingerprint=fingerprint or cache.engine.fingerprint,
        spec=cache.engine.spec,
        batch_tokens=TOKENS,
    )


def stored(path: Path, model: Path, computing: BatchComputer | None = None) -> dict[bytes, object]:
    with opened(path) as cache:
        work = make_plan(cache, DOCUMENTS, batch_tokens=TOKENS)
        done = run(cache.store, work, computing or compute_locally(cache.engine))
        assert done.computed == work.missing
        assert make_plan(cache, DOCUMENTS, batch_tokens=TOKENS).missing.chunks == 0
    return dict(contents(path))


def pids() -> list[int]:
    """Of the workers of the Ray that this process has started, which runs them in its children."""
    mine = os.getpid()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = b"ray::ChunkWorker" in (process / "cmdline").read_bytes()
            if named and parent(parent(int(process.name))) == mine:
                found.append(int(process.name))
        except OSError:
            continue  # it has ended
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[bytes, object]:
    return stored(tmp_path_factory.mktemp("local"), model)


def test_the_store_is_that_of_a_local_run(
    tmp_path: Path, model: Path, local: dict[bytes, object]
) -> None:
    with opened(tmp_path / "probe") as cache:
        computing = workers(cache, model)
    assert stored(tmp_path / "ray", model, computing) == local


def test_a_killed_workers_batches_are_done_by_others(
    tmp_path: Path, model: Path, local: dict[bytes, object]
) -> None:
    with opened(tmp_path / "probe") as cache:
        computing = workers(cache, model)
    killed = list[int]()

    def killing(every: Iterable[Batch]) -> object:
        for number, done in enumerate(computing(every)):
            if number in (2, 6):
                [first, *_] = pids()
                os.kill(first, signal.SIGKILL)
                killed.append(first)
            yield done

    found = stored(tmp_path / "ray", model, killing)  # type: ignore[arg-type]
    assert found == local and len(set(killed)) == 2


def test_a_batch_that_ends_every_worker_is_given_up(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(module.ChunkWorker):
        def compute(self, context: Tokens, chunks: list[Tokens]) -> list[module._SentChunk]:
            os.kill(os.getpid(), signal.SIGKILL)
            return []

    monkeypatch.setattr(module, "ChunkWorker", Dies)
    with opened(tmp_path) as cache:
        work = make_plan(cache, DOCUMENTS, batch_tokens=TOKENS)
        with pytest.raises(RagCacheError, match="3 workers have died over a batch of"):
            run(cache.store, work, workers(cache, model))


def test_workers_with_another_model_are_refused(tmp_path: Path, model: Path) -> None:
    other = models.engine("llama", seed=1).fingerprint
    with opened(tmp_path) as cache:
        work = make_plan(cache, DOCUMENTS, batch_tokens=TOKENS)
        with pytest.raises(ModelError, match="which is not the driver's model"):
            run(cache.store, work, workers(cache, model, other))
        assert cache.store.stats().chunks == 0


def test_the_example(tmp_path: Path, tiny_model_dir: Path) -> None:
    """KV by Ray's workers, none of it computed again by `index`, and found by the question."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    question = "Which country does Hexstead belong to?"
    done = subprocess.run(
        ["sh", str(EXAMPLE), str(world_file("documents.jsonl")), question, "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "KV of 0 chunks" in said and "Cuba" in said
