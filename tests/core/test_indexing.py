"""Indexing that was killed and is run again: it finishes, and recomputes nothing stored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ragcache.types import Document
from tests import scene

DOCUMENTS = [
    Document(f"d{i}", f"Note {i}: Mira keeps {i} parrots. She feeds them.") for i in range(12)
]

CHILD = """
import sys, time
from pathlib import Path
from tests import scene
from tests.core import test_indexing as test_kill

cache = scene.small(Path(sys.argv[1]))
put_all = cache.store.put_all
def slow(chunks):
    put_all(chunks)
    print("put", flush=True)
    time.sleep(0.02)
cache.store.put_all = slow
for step in cache.indexing.iter_add(test_kill.DOCUMENTS, batch_tokens=32):
    pass
"""


def test_killed_and_run_again(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert child.stdout is not None
    with child, child.stdout as lines:
        for _ in range(5):
            assert lines.readline() == b"put\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with scene.small(tmp_path) as cache:
        stored = cache.store.stats().chunks
        assert cache.store.verify() == {}
        done = cache.add(DOCUMENTS)
        total = done.precomputed.encoded + done.precomputed.stored
        assert 5 <= stored == done.precomputed.stored < total
        assert done.documents == 0  # text and vectors were committed before
        assert cache.store.verify() == {}
        answer = cache.ask("How many parrots?", top_k=9)
    assert all(chunk.miss is None for chunk in answer.report.chunks)
