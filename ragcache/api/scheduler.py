"""One engine, many questions: who is next.

The engine runs one thing at a time, so one thread does all of its work. A question is an iterator:
its first step looks up, loads, fuses and gives the first token; every further one decodes. Between
two steps, whatever waits is looked at anew:

1. what was given up, or whose time is over, is ended: that costs nothing and makes room;
2. a question that waits for its first token goes first, unless ``streams`` answers are under way;
   tenants take turns, and of one tenant the oldest goes first;
3. else the answers that are under way take a step each, in turns;
4. else what can wait is done: work that nobody waits for, such as storing what an answer missed.

So a long answer keeps no new question from its first token. Nor does a flood of questions by one
tenant: each has a queue of its own, the others have their turns, and a tenant with nothing under
way finds a place beside ``streams`` answers of others. What can wait gets a tenth of the engine's
time even where there is never nothing else to do: one piece of it then goes before a first token,
and no more than one.

What a step has begun is not interrupted, but ``check`` is called between layers and tokens, and
ends a question that was given up or whose time is over. One that still waits is ended by a second
thread, so that it is told in time however long the engine is at its step.
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

from ragcache.api.waiting import Busy, Closing, GivenUp, Ticket, Told, TooLate, Waiting
from ragcache.errors import RagCacheError

__all__ = ["Busy", "Closing", "GivenUp", "WAITS", "Scheduler", "Ticket", "Told", "TooLate"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WAITS = object()  # a step that came to nothing yet
_SHARE = 0.1  # of the engine's time for what can wait, at the least
_PATIENCE_S = 1.0  # that it waits at the least, where there is anything else to do
_RETRY_S = 1.0, 60.0  # the least and the most that is said
_STUCK_S = 10.0  # for what is given up to end


class Scheduler:
    """Runs what is submitted on a thread of its own. ``queue``: questions of a tenant that may
    wait, and pieces of work that nobody waits for; ``streams``: answers under way at a time, up to
    twice as many where tenants would have none otherwise."""

    def __init__(
        self, *, queue: int = 64, streams: int = 16, patience_s: float = _PATIENCE_S
    ) -> None:
        self.queue, self.streams, self.patience_s = queue, streams, patience_s
        lock = threading.RLock()
        self._work, self._clock, self._idle = (threading.Condition(lock) for _ in range(3))
        self._lock = lock
        self._waiting = Waiting()
        self._active: deque[Ticket] = deque()
        self._later: deque[Callable[[], object]] = deque()
        self._meanwhile: deque[Callable[[], object]] = deque()
        self._due = 0.0  # when what can wait has waited long enough
        self._question_s = 0.1  # of the engine's time for a question, a running mean
        self._draining = self._ending = self._closed = False
        self._threads = [
            threading.Thread(target=self._loop, name="ragcache-engine", daemon=True),
            threading.Thread(target=self._watch, name="ragcache-clock", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        tenant: str,
        run: Callable[[Callable[[], None]], Iterator[Any]],
        told: Told,
        *,
        seconds: float | None = None,
    ) -> Ticket:
        """Queue a question; ``run(check)`` iterates over its pieces, and over WAITS where it waits
        for another machine: it is then told nothing. ``seconds``: from now on
        until TooLate. Raises Busy where the tenant's queue is full, Closing where all ends."""
        deadline = None if seconds is None else time.monotonic() + seconds
        ticket = Ticket(tenant, run, told, deadline, _look=self._look)
        with self._lock:
            self._check_open()
            if (waiting := self._waiting.of(tenant)) >= self.queue:
                least, most = _RETRY_S  # those of all tenants are to be through
                seconds = len(self._waiting) * self._question_s
                raise Busy(waiting, min(most, max(least, seconds)))
            self._waiting.add(ticket)
            self._look()
        return ticket

    def later(self, work: Callable[[], None]) -> bool:
        """Do this when nothing else waits; its errors are logged. Returns False, and does not take
        it, where ``queue`` of these wait already, or all ends."""
        with self._lock:
            if self._draining or len(self._later) >= self.queue:
                return False
            self._put_off(self._later, lambda: None if self._ending else work())
        return True

    def background(self, steps: Generator[object, None, Result]) -> Future[Result]:
        """Run ``steps`` as what can wait, one at a time; the future has what they return.

        To cancel it ends them between two steps; so does the end of all, with GivenUp. Raises
        Closing.
        """
        future: Future[Result] = Future()

        def step() -> None:
            try:
                if future.cancelled() or self._ending:
                    steps.close()
                    raise GivenUp
                next(steps)
            except StopIteration as end:
                if future.set_running_or_notify_cancel():
                    future.set_result(end.value)
            except BaseException as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                with self._lock:
                    self._put_off(self._later, step)

        with self._lock:
            self._check_open()
            self._put_off(self._later, step)
        return future

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Do this on the engine's thread, in one step, as ``background`` does its steps."""

        def once() -> Generator[object, None, Result]:
            yield from ()
            return work()

        return self.background(once())

    def meanwhile(self, step: Callable[[], bool]) -> None:
        """Repeat this step, behind all other work, as long as it returns True: for long work in
        small pieces. Closing does not wait for it."""
        with self._lock:
            self._put_off(self._meanwhile, step)

    def depth(self) -> tuple[int, int]:
        """(waiting, under way)."""
        with self._lock:
            return len(self._waiting), len(self._active)

    def close(self, seconds: float = 30.0) -> None:
        """Take nothing more, finish what there is within ``seconds``, and give the rest up. Every
        ticket has been told its end when this returns. A second call does nothing. Not for a thread
        of the scheduler."""
        with self._lock:
            self._draining = True
            if not self._idle.wait_for(self._is_idle, seconds):
                self._ending = True
                for ticket in (*self._active, *self._waiting):
                    ticket.give_up()
                self._idle.wait_for(self._is_idle, _STUCK_S)
            self._closed = True
            self._look()
        for thread in self._threads:
            thread.join(_STUCK_S)

    def _is_idle(self) -> bool:
        return not (self._active or self._later or self._waiting)

    def _goes_on(self) -> bool:
        """Whether there is long work, and time for it."""
        return bool(self._meanwhile) and not self._draining

    def _look(self) -> None:
        """Something has changed that either thread may have to act upon."""
        with self._lock:
            self._work.notify()
            self._clock.notify()

    def _check_open(self) -> None:
        if self._draining:
            raise Closing

    def _put_off(self, queue: deque[Callable[[], object]], work: Callable[[], object]) -> None:
        if not (self._later or self._meanwhile):
            self._due = max(self._due, time.monotonic() + self.patience_s)
        queue.append(work)
        self._work.notify()

    def _loop(self) -> None:
        while True:
            with self._lock:
                if self._is_idle():
                    self._idle.notify_all()
                self._work.wait_for(lambda: self._closed or not self._is_idle() or self._goes_on())
                if self._closed:
                    break
                do = self._next()
            try:
                do()
            except BaseException:  # whatever it was, all who wait would wait for ever
                logger.exception("a step of the engine has failed")
            del do  # what it holds is memory
        while self._active:  # a step did not end in time
            self._end(self._active[0], "failed", GivenUp())
        while self._later:
            self._later.popleft()()

    def _watch(self) -> None:
        """Tell their end to those that wait in vain: too late, or given up."""
        while True:
            with self._lock:
                over = self._waiting.over()
                if self._is_idle():
                    self._idle.notify_all()
                if not over:
                    if self._closed:
                        return
                    deadline = self._waiting.next_deadline()
                    left = None if deadline is None else deadline - time.monotonic()
                    self._clock.wait(left if left is None else max(0.001, left))
            for ticket, error in over:
                self._tell(ticket, "failed", error)

    def _next(self) -> Callable[[], None]:
        """What to do now, taken out of where it waits; there is something."""
        over = next((t for t in self._active if t.over() is not None), None)
        if over is not None:
            return partial(self._step, over)
        can_wait = self._later or self._goes_on()
        if can_wait and time.monotonic() >= self._due:
            return self._spare()
        ticket = self._question()
        if ticket is None and self._active:
            ticket = self._active[0]
            self._active.rotate(-1)
        return self._spare() if ticket is None else partial(self._step, ticket)

    def _question(self) -> Ticket | None:
        """One that waits for its first token; from now on it counts as under way."""
        busy, active = {ticket.tenant for ticket in self._active}, len(self._active)
        ticket = self._waiting.take(
            lambda tenant: active < (self.streams if tenant in busy else 2 * self.streams)
        )
        if ticket is not None:
            self._active.append(ticket)
        return ticket

    def _spare(self) -> Callable[[], None]:
        again = not self._later
        return partial(self._do, (self._meanwhile if again else self._later).popleft(), again)

    def _do(self, work: Callable[[], object], again: bool) -> None:
        began = time.monotonic()
        try:
            again = work() is True and again
        except BaseException:
            logger.exception("work that nobody waits for has failed")
            again = False
        took = time.monotonic() - began
        with self._lock:
            if again:
                self._meanwhile.append(work)
            self._due = began + took / _SHARE

    def _step(self, ticket: Ticket) -> None:
        began = time.monotonic()
        try:
            ticket.check()
            if ticket._steps is None:
                ticket.begun = began
                ticket._steps = iter(ticket.run(ticket.check))
            piece = next(ticket._steps)
        except StopIteration:
            spent = ticket._spent_s + time.monotonic() - began
            self._question_s += 0.2 * (spent - self._question_s)
            self._end(ticket, "done", None)
        except (GivenUp, TooLate, RagCacheError) as error:
            self._end(ticket, "failed", error)
        except Exception as error:
            logger.exception("a question has failed")
            self._end(ticket, "failed", error)
        except BaseException as error:  # a panic of a library in Rust, say: the thread goes on
            logger.exception("a question has failed")
            self._end(ticket, "failed", RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            ticket._spent_s += time.monotonic() - began
            if piece is not WAITS:
                self._tell(ticket, "piece", piece)

    def _end(self, ticket: Ticket, how: str, error: Exception | None) -> None:
        steps, ticket._steps = ticket._steps, iter(())
        try:
            if (close := getattr(steps, "close", None)) is not None:
                close()
        except BaseException:
            logger.exception("a question could not be closed")
        with self._lock:
            self._active.remove(ticket)
        self._tell(ticket, how, error)

    def _tell(self, ticket: Ticket, how: str, what: Any) -> None:
        """Tell, and log what the listener raises: it must not end the thread that all share."""
        try:
            ticket.told(how, what)
        except BaseException:
            logger.exception("a question could not be told of its %s", how)
            ticket.give_up()
