"""One engine, many questions: who is next.

The engine runs one thing at a time, so one thread does all of its work. A question is an iterator:
its first step looks up, loads, fuses and gives the first token; every further one decodes. Between
two steps, whatever waits is looked at anew:

1. a question that waits for its first token goes first, unless ``streams`` are being answered; of
   several, one of the tenant that was served the longest ago, and of that tenant's the oldest;
2. else the answers that are under way take a step each, in turns;
3. else what can wait is done, such as storing what an answer missed, or the next step of adding
   documents. Once it has waited for ``PATIENCE_S``, it takes every other turn.

So a long answer keeps no new question from its first token, a flood of questions by one tenant
keeps out no other's, and what can wait does not pile up. What a step has begun is not interrupted, but ``check`` is called between
layers and tokens, and ends a question that was given up or whose time is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ragcache.errors import RagCacheError

logger = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE_S = 1.0  # of what can wait


class Closing(Exception):
    """The scheduler takes nothing more."""


class Busy(Exception):
    """A tenant's queue is full. ``retry_after_s``: when there should be room."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} questions are waiting already")
        self.retry_after_s = retry_after_s


class GivenUp(Exception):
    """Nobody waits for this answer any more."""


class TooLate(Exception):
    """The time that a question was given is over."""


#: Told of every step: ("piece", text), then ("done", None) or ("failed", the exception). Called on
#: the engine's thread.
Told = Callable[[str, Any], None]


@dataclass(eq=False)
class Ticket:
    """A question that was handed in."""

    tenant: str
    run: Callable[[Callable[[], None]], Iterator[Any]]
    told: Told
    deadline: float | None = None  # of time.monotonic
    queued: float = field(default_factory=time.monotonic)
    begun: float | None = None
    _given_up: bool = False
    _steps: Iterator[Any] | None = None

    def give_up(self) -> None:
        """Let it end at the next layer or token; from any thread. It is told ("failed", GivenUp),
        unless it has ended."""
        self._given_up = True

    @property
    def is_over(self) -> bool:
        """Whether ``check`` raises."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self._given_up or late

    def check(self) -> None:
        """Raise GivenUp or TooLate where it should go on no longer."""
        if self._given_up:
            raise GivenUp
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TooLate


class Scheduler:
    """Runs what is submitted on a thread of its own. ``queue``: questions of a tenant that may
    wait; ``streams``: answers under way at a time."""

    def __init__(self, *, queue: int = 64, streams: int = 16) -> None:
        self.queue, self.streams = queue, streams
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Ticket]] = {}
        self._served: dict[str, float] = {}  # tenant -> when it was served last
        self._active: deque[Ticket] = deque()
        self._later: deque[tuple[float, Callable[[], None]]] = deque()  # since when, what
        self._had_turn = False  # what can wait was done last, ahead of a question
        self._step_s = 0.1  # of a question's first step, a running mean
        self._draining = self._ending = self._closed = False
        self._thread = threading.Thread(target=self._loop, name="ragcache-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        tenant: str,
        run: Callable[[Callable[[], None]], Iterator[Any]],
        told: Told,
        *,
        seconds: float | None = None,
    ) -> Ticket:
        """Queue a question; ``run(check)`` iterates over its pieces. ``seconds``: from now on
        until TooLate. Raises Busy where the tenant's queue is full, Closing where all ends."""
        deadline = None if seconds is None else time.monotonic() + seconds
        ticket = Ticket(tenant, run, told, deadline)
        with self._changed:
            self._check_open()
            waiting = len(self._waiting.get(tenant, ()))
            if waiting >= self.queue:
                raise Busy(waiting, max(1.0, waiting * self._step_s))
            self._waiting.setdefault(tenant, deque()).append(ticket)
            self._changed.notify_all()
        return ticket

    def later(self, work: Callable[[], None]) -> None:
        """Do this when nobody waits for anything else. Its errors are logged."""
        with self._changed:
            self._later.append((time.monotonic(), work))
            self._changed.notify_all()

    def background(self, steps: Generator[object, None, T]) -> Future[T]:
        """Run ``steps`` as what can wait, one at a time; the future has what they return.

        To cancel it ends them between two steps; so does the end of all, with GivenUp. Raises
        Closing.
        """
        future: Future[T] = Future()

        def step() -> None:
            ended: Exception | None = None
            try:
                if future.cancelled() or self._ending:
                    steps.close()
                    raise GivenUp
                next(steps)
            except StopIteration as end:
                if future.set_running_or_notify_cancel():
                    future.set_result(end.value)
            except Exception as error:
                ended = error
            else:
                self.later(step)
            if ended is not None and future.set_running_or_notify_cancel():
                future.set_exception(ended)

        with self._changed:
            self._check_open()
            self.later(step)
        return future

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do this on the engine's thread, in one step, as ``background`` does its steps."""

        def once() -> Generator[object, None, T]:
            yield from ()
            return work()

        return self.background(once())

    def depth(self) -> tuple[int, int]:
        """(waiting, under way)."""
        with self._changed:
            return sum(map(len, self._waiting.values())), len(self._active)

    def close(self, seconds: float = 30.0) -> None:
        """Take nothing more; finish what there is for so long, then give the rest up. A second
        call does nothing."""
        with self._changed:
            self._draining = True
            idle = self._changed.wait_for(self._is_idle, seconds)
            if not idle:
                self._ending = True
                for ticket in (*self._active, *(t for q in self._waiting.values() for t in q)):
                    ticket.give_up()
                self._changed.notify_all()
                self._changed.wait_for(self._is_idle, 10.0)
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10.0)

    def _check_open(self) -> None:
        if self._draining:
            raise Closing

    def _is_idle(self) -> bool:
        return not (self._active or self._later or any(self._waiting.values()))

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._is_idle())
                if self._closed:
                    return
                ticket, work = self._next()
            if ticket is not None:
                self._step(ticket)
            elif work is not None:
                try:
                    work()
                except Exception:
                    logger.exception("work that nobody waits for has failed")
            with self._changed:
                self._changed.notify_all()

    def _next(self) -> tuple[Ticket | None, Callable[[], None] | None]:
        """What to do now; a question that is taken from the queue counts as under way."""
        for queue in self._waiting.values():
            for ticket in queue:
                if ticket.is_over:  # costs nothing, and its place is free at once
                    return self._taken(ticket), None
        impatient = self._later and time.monotonic() - self._later[0][0] > PATIENCE_S
        self._had_turn = bool(impatient) and not self._had_turn
        if self._had_turn:
            return None, self._later.popleft()[1]
        if self._waiting and len(self._active) < self.streams:
            tenant = min(self._waiting, key=lambda name: self._served.get(name, 0.0))
            self._served[tenant] = time.monotonic()
            return self._taken(self._waiting[tenant][0]), None
        if self._active:
            ticket = self._active[0]
            self._active.rotate(-1)
            return ticket, None
        return None, self._later.popleft()[1]

    def _taken(self, ticket: Ticket) -> Ticket:
        queue = self._waiting[ticket.tenant]
        queue.remove(ticket)
        if not queue:
            del self._waiting[ticket.tenant]
        self._active.append(ticket)
        return ticket

    def _step(self, ticket: Ticket) -> None:
        began = time.monotonic()
        first = ticket._steps is None
        try:
            ticket.check()
            if ticket._steps is None:
                ticket.begun = began
                ticket._steps = iter(ticket.run(ticket.check))
            piece = next(ticket._steps)
        except StopIteration:
            self._end(ticket, "done", None)
        except Exception as error:
            if not isinstance(error, (GivenUp, TooLate, RagCacheError)):
                logger.exception("a question has failed")
            self._end(ticket, "failed", error)
        else:
            self._tell(ticket, "piece", piece)
        if first:
            self._step_s += 0.2 * (time.monotonic() - began - self._step_s)

    def _end(self, ticket: Ticket, how: str, error: Exception | None) -> None:
        steps, ticket._steps = ticket._steps, iter(())
        close = getattr(steps, "close", None)
        if close is not None:
            close()
        with self._changed:
            self._active.remove(ticket)
        self._tell(ticket, how, error)

    def _tell(self, ticket: Ticket, kind: str, value: object) -> None:
        """Whoever cannot be told waits no more; the engine's thread goes on."""
        try:
            ticket.told(kind, value)
        except Exception:
            logger.exception("a question's asker cannot be told")
            ticket.give_up()
