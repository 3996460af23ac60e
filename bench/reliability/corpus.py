"""SIGKILL at random times during precompute, repeatedly, until a run finishes.

A forked process plans and computes a corpus. It reports when the plan is made, and for every batch
when it is computed and when it is stored. It is killed after a random number of reports and a
random delay. In the end the store must contain every chunk, bit-identical to that of an
uninterrupted run, and no chunk may have been computed again after it was reported as stored.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.filled import small
from bench.reliability.child import Child, Send
from bench.reliability.outcome import Outcome, scratch
from ragcache.batch.plan import PrecomputePlan, make_plan
from ragcache.batch.run import ComputedBatches, compute_locally
from ragcache.batch.run import run as compute_all
from ragcache.core.precompute import Batch
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.retriever.split import WHOLE
from ragcache.settings import Settings
from ragcache.store import DiskStore
from ragcache.store.format.header import Header, decode_header
from ragcache.types import Document

FULL, SHORT = 20, 1
EACH = 110  # chunks of the corpus for every kill
BATCH_TOKENS = 512
_MOMENT = 0.1  # seconds: a batch or so
_WORDS = "the mill on the river grinds no more and the boats were sold in Oslo last May".split()


def documents(count: int) -> list[Document]:
    """Of one chunk each, some of a few tokens and some of a hundred."""
    rng = random.Random(7)
    texts = (
        f"Note {n}: " + " ".join(rng.choices(_WORDS, k=int(4 * 2 ** rng.uniform(0, 4))))
        for n in range(count)
    )
    return [Document(f"d{n}", text, WHOLE) for n, text in enumerate(texts)]


@contextmanager
def opened(path: Path) -> Iterator[RagCache]:
    with RagCache(_ENGINE, DiskStore(path), HashEmbedder(), path, Settings.load()) as cache:
        yield cache


_ENGINE = small()


def planned(cache: RagCache, count: int) -> PrecomputePlan:
    return make_plan(cache, documents(count), batch_tokens=BATCH_TOKENS)


def precompute(path: Path, count: int, send: Send) -> None:
    def said(word: str, batch: Batch) -> None:
        send(" ".join([word, *(key.digest.hex()[:8] for key in batch.keys)]))

    def computing(every: Iterable[Batch]) -> ComputedBatches:
        for batch, kvs in compute_locally(_ENGINE)(every):
            said("computed", batch)
            yield batch, kvs
            said("stored", batch)  # it is asked for more once this one is put

    with opened(path) as cache:
        work = planned(cache, count)
        send("planned")
        compute_all(cache.store, work, computing)


def contents(path: Path) -> dict[bytes, tuple[object, ...]]:
    """Of every chunk its tokens, its sensitivity and the checksums of its layers."""
    with DiskStore(path, readonly=True) as store, store.tables.read() as txn:
        headers = [decode_header(record) for _, record in txn.items("headers")]
    return {
        h.key: (h.tokens, h.sensitivity, tuple(p.checksum for p in h.payloads))
        for h in headers
        if isinstance(h, Header)
    }


def run(rounds: int, seed: int) -> Outcome:
    rng, count = random.Random(seed), EACH * rounds
    stored, again, computed, killed, got_on = set[str](), 0, 0, 0, 0
    with scratch() as folder:
        with Child(partial(precompute, folder / "whole", count)) as child:
            words = len(child.read())
            child.wait()
        outcome = Outcome(f"{rounds} kills, {count} chunks")
        through = False
        while not through:
            with Child(partial(precompute, folder / "killed", count)) as child:
                lines = []
                if killed < rounds:
                    wanted = rng.randint(0, int(0.95 * words / rounds))
                    lines = [child.line() for _ in range(wanted)]
                    time.sleep(rng.uniform(0, _MOMENT))
                    child.kill()
                lines += child.read()
                through = child.wait() == 0
            if not through and child.status != -9:
                outcome.violations.append(f"a run ended by itself: {child.status}")
                return outcome
            killed += not through
            got_on += any(line.startswith("stored") for line in lines) and not through
            before = set(stored)
            for word, *names in map(str.split, lines):
                if word == "stored":
                    stored.update(names)
                elif word == "computed":
                    again, computed = again + len(before & set(names)), computed + len(names)
        expected, found = contents(folder / "whole"), contents(folder / "killed")
        with DiskStore(folder / "killed") as store:
            outcome.violations += [f"verify: {what}" for what in store.verify().values()]
    outcome.violations += again * ["computed again though it had been stored"]
    outcome.violations += len(expected.keys() - found.keys()) * ["missing in the end"]
    outcome.violations += len(found.keys() - expected.keys()) * ["too much in the end"]
    both = expected.keys() & found.keys()
    outcome.violations += sum(expected[k] != found[k] for k in both) * ["not bit-equal"]
    if killed < rounds:
        outcome.violations.append(f"got through after {killed} kills")
    outcome.figures += [
        f"{len(found)} chunks in the end, {len(both)} of them bit-equal to an undisturbed run's",
        f"{computed} computed in {killed + 1} runs, {again} of them again after they were stored",
        f"{got_on} of the runs that were killed had stored something",
    ]
    return outcome
