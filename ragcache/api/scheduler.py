"""Schedules all work of one engine on one thread.

The engine runs one thing at a time, so one thread does all of its work. A request is an iterator:
its first step looks up, loads, fuses and gives the first token; every further step decodes one.
Before each step the scheduler chooses again what to run:

1. Requests that are cancelled or past their deadline are ended: that costs nothing and makes room.
2. A request that waits for its first token goes next, unless ``streams`` answers are being
   generated. Tenants take turns, and each tenant's oldest request goes first.
3. Otherwise the answers that are being generated take one step each, in turns.
4. Otherwise other work takes a step: background work that a caller waits for, such as adding
   documents, where tenants take turns step by step; idle work that no caller waits for, such as
   storing the chunks that an answer missed; and recurring work, such as jobs, at every tenth such
   step or where there is nothing else.

So a long answer delays no new request's first token, and neither does one tenant's flood of
requests: each tenant has its own queue and its turns, and a tenant without an answer in progress
may start one beside ``streams`` answers of others. Other work gets a tenth of the engine's time
even under constant load: at most one step of it then goes before a first token.

A step that has begun is not interrupted, but it calls ``check`` between layers and tokens, which
ends a request that is cancelled or past its deadline. Requests that still wait are ended by a
second thread, so their callers learn it in time however long the engine's current step takes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ragcache.api.ticket_queue import (
    DeadlineExceeded,
    EventCallback,
    QueueFull,
    RequestCancelled,
    ShuttingDown,
    Ticket,
    TicketQueue,
)
from ragcache.errors import RagCacheError

__all__ = ["Scheduler"]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

PENDING = object()  # a step that waits for another machine and has no piece yet
_RECURRING_EVERY = 10  # one in so many steps of other work is of recurring work
_BACKGROUND_SHARE = 0.1  # minimum engine share of background, idle and recurring work
_BACKGROUND_DELAY_S = 1.0  # before this work may go before requests
_WORK_RETRY_AFTER_S = 5.0  # Retry-After where the queue of background work is full
_RETRY_AFTER_BOUNDS_S = 1.0, 60.0  # of Retry-After where the queue of requests is full
_CANCEL_TIMEOUT_S = 10.0  # for cancelled work to end


class Scheduler:
    """Runs submitted work on a thread of its own.

    ``queue`` is the number of waiting requests of one tenant, of waiting background work of one
    tenant, and of waiting idle work. ``streams`` is the number of answers that are generated at a
    time; tenants that would otherwise have none may raise it to twice as many.
    ``background_delay_s`` is how long background, idle and recurring work waits at most before it
    takes a step between requests.
    """

    def __init__(
        self,
        *,
        queue: int = 64,
        streams: int = 16,
        background_delay_s: float = _BACKGROUND_DELAY_S,
        name: str = "engine",
    ) -> None:
        self.queue, self.streams, self.background_delay_s = queue, streams, background_delay_s
        lock = threading.RLock()
        self._work, self._clock, self._drained = (threading.Condition(lock) for _ in range(3))
        self._lock = lock
        self._waiting = TicketQueue()
        self._active: deque[Ticket] = deque()
        self._background = TicketQueue()
        self._running: Ticket | None = None  # the background work whose step is running
        self._other_steps = 0  # of background, idle and recurring work
        self._idle: deque[Callable[[], object]] = deque()
        self._recurring: deque[Callable[[], object]] = deque()
        self._due = 0.0  # when other work may go before requests
        self._request_s = 0.1  # engine time per request, a running mean
        self._draining = self._ending = self._closed = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"ragcache-{name}", daemon=True),
            threading.Thread(target=self._watch, name=f"ragcache-{name}-clock", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        tenant: str,
        run: Callable[[Callable[[], None]], Iterator[Any]],
        on_event: EventCallback,
        *,
        seconds: float | None = None,
    ) -> Ticket:
        """Queue a request.

        ``run(check)`` iterates over the pieces of its answer, and over PENDING while it waits for
        another machine, which ``on_event`` does not receive. After ``seconds`` it ends with
        DeadlineExceeded. Raises QueueFull if the tenant's queue is full, and ShuttingDown.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        ticket = Ticket(tenant, run, on_event, deadline, _wake=self._wake)
        with self._lock:
            self.check_open()
            if (waiting := self._waiting.count(tenant)) >= self.queue:
                lower, upper = _RETRY_AFTER_BOUNDS_S
                seconds = len(self._waiting) * self._request_s  # until all tenants' have ended
                raise QueueFull(waiting, min(upper, max(lower, seconds)))
            self._waiting.add(ticket)
            self._wake()
        return ticket

    def submit_idle(self, work: Callable[[], None]) -> bool:
        """Run ``work`` when nothing else waits; its errors are logged. Returns False, and does not
        accept it, if ``queue`` pieces of idle work wait already or the scheduler shuts down."""
        with self._lock:
            if self._draining or len(self._idle) >= self.queue:
                return False
            self._enqueue(self._idle, lambda: None if self._ending else work())
        return True

    def submit_background(
        self,
        steps: Generator[object, None, _Result],
        *,
        tenant: str = "",
        seconds: float | None = None,
        limit: int | None = None,
    ) -> Future[_Result]:
        """Run ``steps`` as background work, one step at a time, in turns with other tenants' work;
        each tenant's oldest work goes first. The future has the generator's return value.

        Cancelling the future ends the work between two steps. Shutting down ends it with
        RequestCancelled, and ``seconds`` from now it ends with DeadlineExceeded. Raises
        ShuttingDown, and QueueFull if ``limit`` (``queue`` by default) pieces of the tenant's
        background work wait.
        """
        future: Future[_Result] = Future()
        deadline = None if seconds is None else time.monotonic() + seconds

        def on_event(kind: str, value: Any) -> None:
            if future.set_running_or_notify_cancel():
                if kind == "failed":
                    future.set_exception(value)
                else:
                    future.set_result(value)

        ticket = Ticket(tenant, lambda check: steps, on_event, deadline, _wake=self._wake)
        with self._lock:
            self.check_open()
            waiting = self.count_background(tenant)
            if waiting >= (self.queue if limit is None else limit):
                raise QueueFull(waiting, _WORK_RETRY_AFTER_S, "pieces of work")
            self._enqueue(self._background, ticket)
        future.add_done_callback(lambda done: ticket.cancel() if done.cancelled() else None)
        return future

    def count_background(self, tenant: str) -> int:
        """The number of a tenant's pieces of background work, waiting or running."""
        with self._lock:
            running = self._running is not None and self._running.tenant == tenant
            return self._background.count(tenant) + running

    def call(self, work: Callable[[], _Result], *, tenant: str | None = None) -> Future[_Result]:
        """Run ``work`` on the engine's thread in one step: as idle work, or as the background work
        of a ``tenant``."""

        def once() -> Generator[object, None, _Result]:
            yield from ()
            return work()

        if tenant is not None:
            return self.submit_background(once(), tenant=tenant)
        future: Future[_Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._ending:
                    raise RequestCancelled
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self.check_open()
            self._enqueue(self._idle, run)
        return future

    def submit_recurring(self, step: Callable[[], bool]) -> None:
        """Repeat ``step``, after all other work, as long as it returns True. Closing does not wait
        for it."""
        with self._lock:
            self._enqueue(self._recurring, step)

    def depth(self) -> tuple[int, int]:
        """(requests that wait, requests that are being answered)."""
        with self._lock:
            return len(self._waiting), len(self._active)

    def close(self, seconds: float = 30.0) -> None:
        """Accept no more work, finish the accepted work within ``seconds``, and cancel the rest.

        Every ticket's callback has received its end when this returns. A second call does nothing.
        Must not be called on a thread of the scheduler.
        """
        with self._lock:
            self._draining = True
            for ticket in self._background:
                if ticket.started_at is None:
                    ticket.cancel()
            if not self._drained.wait_for(self._is_idle, seconds):
                self._ending = True
                running = [] if self._running is None else [self._running]
                for ticket in (*self._active, *self._waiting, *self._background, *running):
                    ticket.cancel()
                self._drained.wait_for(self._is_idle, _CANCEL_TIMEOUT_S)
            self._closed = True
            self._wake()
        for thread in self._threads:
            thread.join(_CANCEL_TIMEOUT_S)

    def _is_idle(self) -> bool:
        return not (
            self._active
            or self._idle
            or self._waiting
            or self._background
            or self._running is not None
        )

    def _has_recurring(self) -> bool:
        """Whether there is recurring work that may still run."""
        return bool(self._recurring) and not self._draining

    def _wake(self) -> None:
        """Have both threads look at the state again."""
        with self._lock:
            self._work.notify()
            self._clock.notify()

    def check_open(self) -> None:
        """Raise ShuttingDown if no more work is accepted."""
        if self._draining:
            raise ShuttingDown

    def _enqueue(self, queue: deque[Callable[[], object]] | TicketQueue, work: Any) -> None:
        if not (self._idle or self._recurring or self._background):
            self._due = max(self._due, time.monotonic() + self.background_delay_s)
        if isinstance(queue, TicketQueue):
            queue.add(work)
        else:
            queue.append(work)
        self._wake()

    def _loop(self) -> None:
        while True:
            with self._lock:
                if self._is_idle():
                    self._drained.notify_all()
                self._work.wait_for(
                    lambda: self._closed or not self._is_idle() or self._has_recurring()
                )
                if self._closed:
                    break
                step = self._next()
            try:
                step()
            except BaseException:  # without this thread every caller would wait for ever
                logger.exception("a step of the scheduler failed")
            del step  # it may hold memory
        while self._active:  # a step did not end in time
            self._end(self._active[0], "failed", RequestCancelled())
        for ticket in list(self._background):
            self._end_background(ticket, "failed", RequestCancelled())
        while self._idle:
            self._idle.popleft()()

    def _watch(self) -> None:
        """End waiting work that is cancelled or past its deadline."""
        while True:
            with self._lock:
                ended = self._waiting.take_ended() + self._background.take_ended()
                if self._is_idle():
                    self._drained.notify_all()
                if not ended:
                    if self._closed:
                        return
                    deadlines = self._waiting.next_deadline(), self._background.next_deadline()
                    deadline = min((one for one in deadlines if one is not None), default=None)
                    left = None if deadline is None else deadline - time.monotonic()
                    self._clock.wait(left if left is None else max(0.001, left))
            for ticket, error in ended:
                self._notify(ticket, "failed", error)

    def _next(self) -> Callable[[], None]:
        """The step to run now, removed from its queue. There must be one."""
        ended = next((t for t in self._active if t.end_reason() is not None), None)
        if ended is not None:
            return partial(self._step, ended)
        if ended_work := self._background.take_ended(started=True):
            return partial(self._end_all_background, ended_work)
        other = self._idle or self._background or self._has_recurring()
        if other and time.monotonic() >= self._due:
            return self._next_other()
        ticket = self._next_waiting()
        if ticket is None and self._active:
            ticket = self._active[0]
            self._active.rotate(-1)
        return self._next_other() if ticket is None else partial(self._step, ticket)

    def _next_waiting(self) -> Ticket | None:
        """A request that waits for its first token; from now on it is an active one."""
        busy, active = {ticket.tenant for ticket in self._active}, len(self._active)
        ticket = self._waiting.take(
            lambda tenant: active < (self.streams if tenant in busy else 2 * self.streams)
        )
        if ticket is not None:
            self._active.append(ticket)
        return ticket

    def _next_other(self) -> Callable[[], None]:
        """A step of background, idle or recurring work."""
        self._other_steps += 1
        recurring = self._has_recurring() and self._other_steps % _RECURRING_EVERY == 0
        if recurring or not (self._idle or self._background):
            return partial(self._call, self._recurring.popleft(), True)
        if self._idle and (not self._background or self._other_steps % 2):
            return partial(self._call, self._idle.popleft(), False)
        ticket = self._background.take(lambda tenant: True)
        assert ticket is not None
        self._running = ticket
        ticket.started_at = ticket.started_at or time.monotonic()
        return partial(self._step_background, ticket)

    def _step_background(self, ticket: Ticket) -> None:
        began = time.monotonic()
        try:
            ticket.check()
            if ticket._steps is None:
                ticket._steps = iter(ticket.run(ticket.check))
            next(ticket._steps)
        except StopIteration as end:
            self._end_background(ticket, "done", end.value)
        except BaseException as error:
            self._end_background(ticket, "failed", error)
        else:
            with self._lock:
                self._running = None
                self._background.put_back(ticket)
        with self._lock:
            self._due = began + (time.monotonic() - began) / _BACKGROUND_SHARE

    def _end_all_background(self, ended: list[tuple[Ticket, Exception]]) -> None:
        for ticket, error in ended:
            self._end_background(ticket, "failed", error)

    def _end_background(self, ticket: Ticket, kind: str, value: Any) -> None:
        self._close_steps(ticket)
        self._notify(ticket, kind, value)
        with self._lock:
            if self._running is ticket:
                self._running = None

    def _call(self, work: Callable[[], object], recurring: bool) -> None:
        """Run idle work, or a step of recurring work."""
        began, again = time.monotonic(), False
        try:
            again = work() is True and recurring
        except BaseException:
            logger.exception("idle or recurring work failed")
        took = time.monotonic() - began
        with self._lock:
            if again:
                self._recurring.append(work)
            self._due = began + took / _BACKGROUND_SHARE

    def _step(self, ticket: Ticket) -> None:
        began = time.monotonic()
        try:
            ticket.check()
            if ticket._steps is None:
                ticket.started_at = began
                ticket._steps = iter(ticket.run(ticket.check))
            piece = next(ticket._steps)
        except StopIteration:
            spent = ticket._engine_s + time.monotonic() - began
            self._request_s += 0.2 * (spent - self._request_s)
            self._end(ticket, "done", None)
        except (RequestCancelled, DeadlineExceeded, RagCacheError) as error:
            self._end(ticket, "failed", error)
        except Exception as error:
            logger.exception("a request failed")
            self._end(ticket, "failed", error)
        except BaseException as error:  # such as a panic of a Rust library: the thread continues
            logger.exception("a request failed")
            self._end(ticket, "failed", RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            ticket._engine_s += time.monotonic() - began
            if piece is not PENDING:
                self._notify(ticket, "piece", piece)

    def _end(self, ticket: Ticket, kind: str, error: Exception | None) -> None:
        self._close_steps(ticket)
        with self._lock:
            self._active.remove(ticket)
        self._notify(ticket, kind, error)

    def _close_steps(self, ticket: Ticket) -> None:
        steps, ticket._steps = ticket._steps, iter(())
        try:
            if isinstance(steps, Generator):
                steps.close()
        except BaseException:
            logger.exception("a request could not be closed")

    def _notify(self, ticket: Ticket, kind: str, value: Any) -> None:
        """Call the ticket's callback. Its errors are logged: they must not end the thread that all
        requests share."""
        try:
            ticket.on_event(kind, value)
        except BaseException:
            logger.exception("the callback of a request failed at its event %r", kind)
            ticket.cancel()
