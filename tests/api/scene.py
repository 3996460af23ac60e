"""Listeners, a paused scheduler, and a service over a small random model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ragcache.api.quality_monitor import QualityMonitor
from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.core.request import Request
from ragcache.settings import ServiceSettings
from ragcache.types import Answer, Chunk
from tests import scene

SOON = 20.0  # seconds that a test waits for what must happen

NewThreads = Callable[[], set[str]]


class Heard:
    """What one question has received, and whether it has ended."""

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        self.name, self.log = name, log
        self.pieces: list[Any] = []
        self.ends: list[tuple[str, Any]] = []
        self.ended, self.begun = threading.Event(), threading.Event()

    def __call__(self, how: str, what: Any) -> None:
        if how == "piece":
            self.pieces.append(what)
            self.begun.set()
            if self.log is not None:
                self.log.append(f"{self.name}{len(self.pieces)}")
        else:
            self.ends.append((how, what))
            self.ended.set()

    def end(self) -> str:
        """``done``, or the name of the error, when it has arrived, exactly once."""
        assert self.ended.wait(SOON), f"{self.name} has not ended"
        [(how, error)] = self.ends
        return how if error is None else type(error).__name__


def pieces(count: int) -> Callable[[Callable[[], None]], Iterator[int]]:
    """An answer of so many pieces."""
    return lambda check: iter(range(count))


class Held:
    """The engine's thread stands still from the ``with`` on, until :meth:`let_go` or its end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._stands, self._go = threading.Event(), threading.Event()

        def wait() -> None:
            self._stands.set()
            assert self._go.wait(SOON)

        scheduler.submit_idle(wait)
        assert self._stands.wait(SOON)

    def let_go(self) -> None:
        self._go.set()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exc: object) -> None:
        self.let_go()


def at_once(steps: Generator[object, None, Any], **options: Any) -> Future[Any]:
    """As :meth:`Scheduler.submit_background`, here and now."""
    done: Future[Any] = Future()
    try:
        while True:
            next(steps)
    except StopIteration as end:
        done.set_result(end.value)
    return done


def told_apart(settings: dict[str, Any]) -> tuple[ServiceSettings, dict[str, Any]]:
    """Settings of the service, and what is left: those of its stores."""
    of_service = {key: settings[key] for key in settings if key in ServiceSettings.model_fields}
    rest = {key: value for key, value in settings.items() if key not in of_service}
    return ServiceSettings.load(**of_service), rest


def small(
    path: Path,
    guard: QualityMonitor | None = None,
    **settings: Any,
) -> Service:
    """A service over a random model, whose answers have 6 tokens. ``settings`` of either kind."""
    limits, rest = told_apart(settings)
    own = scene.small(path, store=path, **rest)
    scheduler = Scheduler(queue=limits.queue, streams=limits.streams, background_delay_s=0.0)
    return Service(own, scheduler, guard, limits)


def asked(service: Service, question: str, *, tenant: str = "", **ask: Any) -> Answer:
    """The answer, once what it left to do later is done."""
    heard = Heard(question)
    service.submit(tenant, Request(question, **ask), heard)
    assert heard.end() == "done", heard.ends
    settle(service)
    answer = heard.pieces[-1]
    assert isinstance(answer, Answer)
    return answer


def given(*texts: str) -> list[Chunk]:
    return [Chunk("given", number, text) for number, text in enumerate(texts)]


def settle(service: Service) -> None:
    """Wait until nothing is left that the scheduler would finish before it closes."""
    scheduler = service.scheduler
    with scheduler._lock:
        assert scheduler._drained.wait_for(scheduler._is_idle, SOON)
    scheduler.call(lambda: None).result(SOON)  # what was begun is over, too
