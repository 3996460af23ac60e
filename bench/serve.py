"""What HTTP adds to a first token: ``python -m bench.serve``.

The same questions about the shipped world are answered by the pipeline in this process, and
streamed over a loopback socket from a server in the same process, in turns. The overhead of a
question is the client's time from the request to the first piece of text, minus the pipeline's time
from the question to the same piece; both include retrieval.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import httpx
import numpy as np
import torch

from bench import results
from ragcache.api.middleware.auth import ApiKeys
from ragcache.api.serve import Server
from ragcache.api.service import Service
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from ragcache.types import Document, Sampling

_S = TypeVar("_S", bound=Service)

KEY = "bench-" + "k" * 32
TENANT = "bench"


@dataclass(frozen=True)
class Overhead:
    workload: str
    pipeline_s: list[float]  # to the first piece, question by question
    service_s: list[float]


def documents(count: int) -> list[Document]:
    """Of the shipped world."""
    with world_file("documents.jsonl").open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [Document(one["id"], one["text"]) for one in found[:count]]


def questions() -> list[str]:
    with world_file("questions.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line in lines]


def serving(
    folder: Path, **settings: object
) -> AbstractContextManager[tuple[Service, httpx.Client]]:
    """A server at a free port of loopback, and a client of it."""
    return serving_as(Service, folder, **settings)


@contextmanager
def serving_as(
    kind: type[_S], folder: Path, **settings: object
) -> Iterator[tuple[_S, httpx.Client]]:
    """The same with a service of this ``kind``."""
    own = {name: settings.pop(name) for name in ServiceSettings.model_fields if name in settings}
    given = Settings.load(**{"store": folder, "model": "tiny", **settings})
    limits = ServiceSettings.load(port=0, monitor_share=0.0, **own)
    with kind.open(given, limits) as service:
        server = Server(service, ApiKeys([(TENANT, KEY)]))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}",
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=120,
                trust_env=False,
            ) as client:
                yield service, client
        finally:
            server.should_exit = True
            thread.join()


def measure(count: int = 200, *, before: int = 10, ratio: float = 0.15) -> Overhead:
    """Ask ``count`` questions both ways, after ``before`` questions to warm up."""
    with TemporaryDirectory() as folder, serving(Path(folder), ratio=ratio) as (service, client):
        cache = service.cache(TENANT)
        service.add(TENANT, documents(60)).result()
        pipeline, http = [], []
        for number, question in enumerate(questions()[: count + before]):
            works: list[Callable[[], float]] = [
                partial(_piped, service, cache, question),
                partial(_streamed, client, question),
            ]
            found = [0.0, 0.0]
            for which in (number % 2, 1 - number % 2):
                found[which] = works[which]()
            if number >= before:
                pipeline.append(found[0])
                http.append(found[1])
    workload = f"{count} questions, 60 documents, mode fused at ratio {ratio}, the small model"
    return Overhead(workload, pipeline, http)


def _piped(service: Service, cache: RagCache, question: str) -> float:
    def ask() -> float:
        began = time.perf_counter()
        next(iter(cache.stream(question, sampling=Sampling(max_tokens=8))))
        return time.perf_counter() - began

    return service.scheduler.call(ask).result()


def _streamed(client: httpx.Client, question: str) -> float:
    body = {"question": question, "max_tokens": 8, "stream": True}
    began = time.perf_counter()
    with client.stream("POST", "/v1/query", json=body) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        assert "delta" in next(lines)
        taken = time.perf_counter() - began
        assert [line for line in lines if line][-1] == "data: [DONE]"
    return taken


def table(found: Overhead) -> str:
    ms = [1000 * np.array(times) for times in (found.pipeline_s, found.service_s)]
    rows = [
        (name, *(f"{np.quantile(values, q):.1f}" for q in (0.5, 0.9, 0.99)))
        for name, values in zip(
            ("pipeline, ms", "service, ms", "overhead, ms"), (*ms, ms[1] - ms[0]), strict=True
        )
    ]
    heads = ("to the first piece of text", "median", "p90", "p99")
    return f"{found.workload}.\n\n" + results.table(heads, rows)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--questions", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.questions)
    results.finish("serve", found, table(found), given.out)


if __name__ == "__main__":
    main()
