"""A timing attack: can a tenant find out what another one has stored?

One tenant asks over chunks that the other has stored, and over chunks that nobody has stored, in
random order. All texts are new to the tenant that asks, and from the same distribution. If the time
to first token distinguished them, the area under the ROC curve (AUC) would differ from 1/2. As a
control, the same is measured for chunks that the asking tenant itself has or has not stored.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from bench.reliability.outcome import Outcome, scratch
from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.core.request import Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.models import TINY, model_path
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import ServiceSettings, Settings
from ragcache.store import DiskStore
from ragcache.types import Chunk, Sampling

FULL, SHORT = 500, 40  # probes
MOST = 0.55  # AUC
CHUNKS = 4  # of a prompt
_WORDS = "town river mill parrot cello boat garden market harbour winter letter bridge".split()
_TOKEN = Sampling(max_tokens=1)


def run(rounds: int, seed: int) -> Outcome:
    outcome = Outcome(f"{rounds} probes, {CHUNKS} chunks each")
    engine = TransformersEngine.load(model_path(TINY), device="cpu")
    with scratch() as folder:
        settings = Settings.load(store=folder, mode="fused", ratio=0.15)
        own = RagCache(engine, DiskStore(folder), HashEmbedder(), folder, settings)
        with Service(own, Scheduler(), settings=ServiceSettings.load()) as service:
            for _ in range(5):  # warms up
                first_token_s(service, "asks", texts(random.Random(0)))
            across = auc(outcome, service, "another's", "stores", rounds, seed)
            auc(outcome, service, "its own", "asks", max(20, rounds // 5), seed)
    if across > MOST:
        outcome.violations.append(f"AUC {across:.3f} is more than {MOST}")
    return outcome


def auc(
    outcome: Outcome, service: Service, whose: str, stores: str, probes: int, seed: int
) -> float:
    """The AUC with which TTFT reveals to tenant "asks" whether tenant ``stores`` has stored the
    chunks: 1/2 is not at all, 1 always, whichever of the two is faster."""
    rng = random.Random(f"{seed}/{whose}")
    prompts = [texts(rng) for _ in range(probes)]
    stored = [number % 2 == 0 for number in range(probes)]
    rng.shuffle(stored)
    for chunks, is_stored in zip(prompts, stored, strict=True):
        if is_stored:
            service.precompute(stores, chunks).result()
    took = np.array([first_token_s(service, "asks", chunks) for chunks in prompts])
    there = np.array(stored)
    value = area(took[there], took[~there])
    outcome.figures.append(
        f"{whose} chunks: AUC {value:.3f} over {probes} probes; first token, median: "
        f"{1e3 * median(took[there]):.2f} ms stored, {1e3 * median(took[~there]):.2f} ms not"
    )
    return value


def area(ones: Any, others: Any) -> float:
    """Under the ROC curve, at least 1/2: the share of pairs in which one kind is the faster."""
    faster = (ones[:, None] < others[None]).mean() + 0.5 * (ones[:, None] == others[None]).mean()
    return max(float(faster), 1 - float(faster))


def texts(rng: random.Random) -> Sequence[Chunk]:
    """New chunks, all of as many words."""
    made = (" ".join(rng.choices(_WORDS, k=30)) for _ in range(CHUNKS))
    return [Chunk("given", number, f"{text}.") for number, text in enumerate(made)]


def first_token_s(service: Service, tenant: str, chunks: Sequence[Chunk]) -> float:
    """From the question to its first token; once its answer has left nothing to do."""
    times: list[float] = []
    ended = threading.Event()

    def told(how: str, what: object) -> None:
        times.append(time.perf_counter())
        if how != "piece":
            ended.set()

    began = time.perf_counter()
    service.submit(tenant, Request("Where is it?", chunks=chunks, sampling=_TOKEN), told)
    ended.wait()
    service.scheduler.call(lambda: None).result()  # after the remaining work
    return times[0] - began
