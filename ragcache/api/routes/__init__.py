"""The routes, by what they are about. What they share is in :class:`State`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ParamSpec, TypeVar, cast

from fastapi import Depends, Request

from ragcache.api.bridge import Asked
from ragcache.api.errors import ClientGone, problem
from ragcache.api.health import Check
from ragcache.api.jobs import Jobs
from ragcache.api.metrics import Metrics
from ragcache.api.responses import usage
from ragcache.api.scheduler import GivenUp, TooLate
from ragcache.api.service import Service
from ragcache.rag import RagCache
from ragcache.types import Sampling

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class State:
    """What an app serves."""

    service: Service
    jobs: Jobs
    metrics: Metrics
    check: Check
    started: int  # seconds since the epoch

    @property
    def sampling(self) -> Sampling:
        """How to decode where a request does not say."""
        return self.service.own.default_sampling

    @property
    def model(self) -> str:
        return self.service.own.engine.name


# Of these, plain functions would be run in threads.
async def _state(request: Request) -> State:
    return cast(State, request.app.state.ragcache)


async def _tenant(request: Request) -> str:
    return cast(str, request.state.tenant)


Served = Annotated[State, Depends(_state)]
Tenant = Annotated[str, Depends(_tenant)]


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do on a thread what needs the store alone: it blocks, and needs no turn of the engine."""
    return await asyncio.to_thread(partial(work, *args, **kwargs))


async def opened(state: State, tenant: str) -> RagCache:
    return await in_thread(state.service.cache, tenant)


def account(state: State, request: Request, asked: Asked, question: str) -> None:
    """Log and count what became of a question."""
    log, answer = request.state.log, asked.answer
    log["queued_ms"] = round(1000 * asked.queued_s, 1)
    if state.service.settings.log_text:
        log["question"] = question
    if answer is None:
        state.metrics.given_up.inc()
        return
    report = answer.report
    if report.no_chunks is not None:
        log["no_chunks"] = report.no_chunks
    log |= {
        "mode": report.mode,
        "ttft_ms": round(1000 * (report.retrieval_s + report.ttft_s), 1),
        "chunks": len(report.chunks),
        "misses": sum(chunk.miss is not None for chunk in report.chunks),
        **usage(answer, flat=True),
    }
    if state.service.settings.log_text:
        log["answer"] = answer.text
    state.metrics.answered(answer, asked.queued_s)


def failed(request: Request, error: Exception | None) -> None:
    """Log how a stream ended whose status had gone out before."""
    if isinstance(error, ClientGone | GivenUp):
        request.state.log["status"] = 499 if isinstance(error, ClientGone) else 503
    elif isinstance(error, TooLate):
        request.state.log["status"] = 504
    elif error is not None:
        request.state.log["status"] = problem(error).status
