"""``/health``, ``/ready``, ``/metrics``, ``/version``, ``/v1/models``: of the service itself."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

import ragcache
from ragcache.api.errors import Problem
from ragcache.api.routes import Served, in_thread
from ragcache.api.scheduler import GivenUp
from ragcache.errors import RagCacheError

router = APIRouter(tags=["service"])

_FRESH_S = 30.0  # a comparison is not made again for so long
_WAIT_S = 10.0  # for the engine


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: Served) -> dict[str, Any]:
    """Model loaded, stores open, and a stored chunk is what the model makes of it now."""
    check, found = state.check, state.check.last
    if found is None or time.monotonic() - check.at > _FRESH_S:
        try:
            work = state.service.scheduler.call(check.run, tenant="/ready")
            found = await asyncio.wait_for(asyncio.wrap_future(work), _WAIT_S)
        except TimeoutError:
            raise _not_ready(f"the engine was busy for {_WAIT_S:.0f} s") from None
        except (RagCacheError, GivenUp) as error:
            raise _not_ready(str(error) or "the service is shutting down") from None
    if not found["ok"]:
        raise _not_ready(f"a stored chunk differs from what the model computes: {found}")
    waiting, active = state.service.scheduler.depth()
    monitor = None if state.service.guard is None else state.service.guard.status()
    return {
        "status": "ready",
        "model": state.model,
        "check": found,
        "queue": {"waiting": waiting, "active": active},
        "quality_monitor": monitor,
        "guard": monitor,  # the name of before, for one more release
    }


@router.get("/metrics")
async def metrics(state: Served) -> Response:
    """For Prometheus."""
    text = await in_thread(state.metrics.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version(state: Served) -> dict[str, Any]:
    engine = state.service.own.engine
    return {
        "ragcache": ragcache.__version__,
        "model": state.model,
        "fingerprint": str(engine.fingerprint),
        "context_tokens": engine.context_tokens,
        "body_bytes": state.service.settings.body_bytes,
    }


@router.get("/v1/models")
async def models(state: Served) -> dict[str, Any]:
    return {"object": "list", "data": [_model(state.model, state.started)]}


@router.get("/v1/models/{id:path}")
async def model(id: str, state: Served) -> dict[str, Any]:
    if id not in (state.model, "ragcache"):
        raise Problem(
            404,
            f"there is no model {id!r} here: ask for {state.model!r}, or 'ragcache'",
            code="model_not_found",
            param="model",
        )
    return _model(id, state.started)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "ragcache"}


def _not_ready(why: str) -> Problem:
    return Problem(
        503,
        f"not ready: {why}. Ask again later; the log says more",
        code="not_ready",
        headers={"Retry-After": "5"},
    )
