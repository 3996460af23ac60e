"""The app: routes, and what stands around them."""

from __future__ import annotations

import time

from fastapi import FastAPI

import ragcache
from ragcache.api import errors
from ragcache.api.health import Check
from ragcache.api.jobs import Jobs
from ragcache.api.metrics import Metrics
from ragcache.api.middleware.access_log import Watched
from ragcache.api.middleware.body_limit import BodyLimit
from ragcache.api.middleware.security import Guarded, Keys
from ragcache.api.paths import ExactPaths
from ragcache.api.routes import State, answers, page, status, stored
from ragcache.api.service import Service

OPEN = "/", "/health", "/demo", "/demo/"  # to everybody


def create_app(service: Service, keys: Keys) -> FastAPI:
    """Serve ``service``, which stays the caller's to close, to whoever has one of ``keys``."""
    app = FastAPI(
        title="ragcache",
        version=ragcache.__version__,
        description="Answers from retrieved chunks whose KV is stored. See docs/serving.md.",
        redoc_url=None,
    )
    metrics = Metrics(service)
    app.state.ragcache = State(service, Jobs(service), metrics, Check(service), int(time.time()))
    for routes in (answers, stored, status, page):
        app.include_router(routes.router)
    errors.install(app)
    app.add_middleware(ExactPaths)
    app.add_middleware(BodyLimit, most=service.settings.body_bytes)
    app.add_middleware(Guarded, keys=keys, open=OPEN)
    app.add_middleware(Watched, metrics=metrics)  # the last one added is the outermost
    return app
