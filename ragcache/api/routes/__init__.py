"""The routes, one module per subject. They share :class:`AppState`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ParamSpec, TypeVar, cast

from fastapi import Depends, Request

from ragcache.api.bridge import AnswerStream
from ragcache.api.errors import ClientDisconnected, as_api_error
from ragcache.api.health import ReadinessCheck
from ragcache.api.jobs import Jobs
from ragcache.api.metrics import Metrics
from ragcache.api.responses import usage
from ragcache.api.service import Service
from ragcache.api.ticket_queue import DeadlineExceeded, RequestCancelled
from ragcache.rag import RagCache
from ragcache.types import Sampling

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class AppState:
    """What the routes of one app use."""

    service: Service
    jobs: Jobs
    metrics: Metrics
    readiness: ReadinessCheck
    started: int  # seconds since the epoch

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters for fields that a request leaves out."""
        return self.service.default_cache.default_sampling

    @property
    def model(self) -> str:
        return self.service.default_cache.engine.name


# These are coroutines because FastAPI runs plain functions in threads.
async def _state(http_request: Request) -> AppState:
    return cast(AppState, http_request.app.state.ragcache)


async def _tenant(http_request: Request) -> str:
    return cast(str, http_request.state.tenant)


StateDep = Annotated[AppState, Depends(_state)]
TenantDep = Annotated[str, Depends(_tenant)]


async def run_in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run blocking work that needs the store and not the engine."""
    return await asyncio.to_thread(partial(work, *args, **kwargs))


async def open_cache(state: AppState, tenant: str) -> RagCache:
    return await run_in_thread(state.service.cache, tenant)


def log_answer(state: AppState, http_request: Request, stream: AnswerStream, question: str) -> None:
    """Record the outcome of a request in the access log and the metrics."""
    log, answer = http_request.state.log, stream.answer
    log["queued_ms"] = round(1000 * stream.queued_s, 1)
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
    state.metrics.record_answer(answer, stream.queued_s)


def log_stream_error(http_request: Request, error: Exception | None) -> None:
    """Log how a stream ended whose HTTP status had been sent before."""
    if isinstance(error, ClientDisconnected | RequestCancelled):
        http_request.state.log["status"] = 499 if isinstance(error, ClientDisconnected) else 503
    elif isinstance(error, DeadlineExceeded):
        http_request.state.log["status"] = 504
    elif error is not None:
        http_request.state.log["status"] = as_api_error(error).status
