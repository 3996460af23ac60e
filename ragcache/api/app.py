"""The FastAPI app: routes and middleware."""

from __future__ import annotations

import time

from fastapi import FastAPI

import ragcache
from ragcache.api import errors
from ragcache.api.health import ReadinessCheck
from ragcache.api.jobs import Jobs
from ragcache.api.metrics import Metrics
from ragcache.api.middleware.access_log import AccessLog
from ragcache.api.middleware.auth import ApiKeyAuth, ApiKeys
from ragcache.api.middleware.body_limit import BodyLimit
from ragcache.api.middleware.path_check import PathCheck
from ragcache.api.routes import AppState, answers, page, status, stored
from ragcache.api.service import Service

_PUBLIC_PATHS = "/", "/health", "/demo", "/demo/"  # need no API key


def create_app(service: Service, keys: ApiKeys) -> FastAPI:
    """Build the app that serves ``service`` to clients with one of ``keys``. The caller closes the
    service."""
    app = FastAPI(
        title="ragcache",
        version=ragcache.__version__,
        description="Answers from retrieved chunks whose KV is stored. See docs/serving.md.",
        redoc_url=None,
    )
    metrics = Metrics(service)
    app.state.ragcache = AppState(
        service, Jobs(service), metrics, ReadinessCheck(service), int(time.time())
    )
    for routes in (answers, stored, status, page):
        app.include_router(routes.router)
    errors.add_exception_handlers(app)
    app.add_middleware(PathCheck)
    app.add_middleware(BodyLimit, max_bytes=service.settings.body_bytes)
    app.add_middleware(ApiKeyAuth, keys=keys, public_paths=_PUBLIC_PATHS)
    app.add_middleware(AccessLog, metrics=metrics)  # the last one added is the outermost
    return app
