"""``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/v1/models``: the service's state."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

import ragcache
from ragcache.api.errors import ApiError
from ragcache.api.routes import StateDep, run_in_thread
from ragcache.api.ticket_queue import RequestCancelled
from ragcache.errors import RagCacheError

router = APIRouter(tags=["service"])

_FRESH_S = 30.0  # for which a readiness result is reused
_WAIT_S = 10.0  # for the engine


@router.get("/health")
async def health() -> dict[str, str]:
    """Liveness: the process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: StateDep) -> dict[str, Any]:
    """Readiness: the model is loaded, the stores are open, and recomputing a stored chunk gives the
    stored KV."""
    check, found = state.readiness, state.readiness.last
    if found is None or time.monotonic() - check.checked_at > _FRESH_S:
        try:
            future = state.service.scheduler.call(check.run, tenant="/ready")
            found = await asyncio.wait_for(asyncio.wrap_future(future), _WAIT_S)
        except TimeoutError:
            raise _not_ready(f"the engine was busy for {_WAIT_S:.0f} s") from None
        except (RagCacheError, RequestCancelled) as error:
            raise _not_ready(str(error) or "the service is shutting down") from None
    if not found["ok"]:
        raise _not_ready(f"a stored chunk differs from what the model computes: {found}")
    waiting, active = state.service.scheduler.depth()
    monitor = state.service.quality_monitor
    quality = None if monitor is None else monitor.status()
    return {
        "status": "ready",
        "model": state.model,
        "check": found,
        "queue": {"waiting": waiting, "active": active},
        "quality_monitor": quality,
        "guard": quality,  # the former name, for one more release
    }


@router.get("/metrics")
async def metrics(state: StateDep) -> Response:
    """Metrics in Prometheus's text format."""
    text = await run_in_thread(state.metrics.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version(state: StateDep) -> dict[str, Any]:
    engine = state.service.default_cache.engine
    return {
        "ragcache": ragcache.__version__,
        "model": state.model,
        "fingerprint": str(engine.fingerprint),
        "context_tokens": engine.context_tokens,
        "body_bytes": state.service.settings.body_bytes,
    }


@router.get("/v1/models")
async def models(state: StateDep) -> dict[str, Any]:
    return {"object": "list", "data": [_model(state.model, state.started)]}


@router.get("/v1/models/{id:path}")
async def model(id: str, state: StateDep) -> dict[str, Any]:
    if id not in (state.model, "ragcache"):
        raise ApiError(
            404,
            f"there is no model {id!r} here: ask for {state.model!r}, or 'ragcache'",
            code="model_not_found",
            param="model",
        )
    return _model(id, state.started)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "ragcache"}


def _not_ready(why: str) -> ApiError:
    return ApiError(
        503,
        f"not ready: {why}. Try again later; the service's log has the details",
        code="not_ready",
        headers={"Retry-After": "5"},
    )
