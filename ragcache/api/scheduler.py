"""One engine, many questions: who is next.

The engine runs one thing at a time, so one thread does all of its work. A question is an iterator:
its first step looks up, loads, fuses and gives the first token; every further one decodes. Between
two steps, whatever waits is looked at anew:

1. what was given up, or whose time is over, is ended: that costs nothing and makes room;
2. a question that waits for its first token goes first, unless ``streams`` answers are under way;
   tenants take turns, and of one tenant the oldest goes first;
3. else the answers that are under way take a step each, in turns;
4. else what can wait is done: work that somebody waits for, such as adding documents, in which
   tenants take turns piece by piece; work that nobody waits for, such as storing what an answer
   missed; and, where there is none of either or every tenth time, long work.

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

from ragcache.api.ticket_queue import Busy, Closing, GivenUp, Ticket, Told, TooLate, Waiting
from ragcache.errors import RagCacheError

__all__ = ["Busy", "Closing", "GivenUp", "WAITS", "Scheduler", "Ticket", "Told", "TooLate"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WAITS = object()  # a step that came to nothing yet
_LONG = 10  # of so many pieces of what can wait, one is of long work
_SHARE = 0.1  # of the engine's time for what can wait, at the least
_PATIENCE_S = 1.0  # that it waits at the least, where there is anything else to do
_AGAIN_S = 5.0  # after which a piece of work may be through
_RETRY_S = 1.0, 60.0  # the least and the most that is said
_STUCK_S = 10.0  # for what is given up to end


class Scheduler:
    """Runs what is submitted on a thread of its own. ``queue``: questions of a tenant that may
    wait, pieces of its work, and pieces of work that nobody waits for; ``streams``: answers under
    way at a time, up to twice as many where tenants would have none otherwise."""

    def __init__(
        self,
        *,
        queue: int = 64,
        streams: int = 16,
        patience_s: float = _PATIENCE_S,
        name: str = "engine",
    ) -> None:
        self.queue, self.streams, self.patience_s = queue, streams, patience_s
        lock = threading.RLock()
        self._work, self._clock, self._idle = (threading.Condition(lock) for _ in range(3))
        self._lock = lock
        self._waiting = Waiting()
        self._active: deque[Ticket] = deque()
        self._works = Waiting()
        self._at: Ticket | None = None  # whose piece of work is being done
        self._pieces = 0  # of what can wait, that were done
        self._later: deque[Callable[[], object]] = deque()
        self._meanwhile: deque[Callable[[], object]] = deque()
        self._due = 0.0  # when what can wait has waited long enough
        self._question_s = 0.1  # of the engine's time for a question, a running mean
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
            self.check_open()
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

    def background(
        self,
        steps: Generator[object, None, Result],
        *,
        tenant: str = "",
        seconds: float | None = None,
        most: int | None = None,
    ) -> Future[Result]:
        """Run ``steps`` as what can wait, one at a time, in turns with other tenants'; of one
        tenant's the oldest is done first. The future has what they return.

        To cancel it ends them between two steps; so does the end of all, with GivenUp, and the end
        of ``seconds`` from now, with TooLate. Raises Closing, and Busy where ``most`` (else
        ``queue``) of the tenant's wait.
        """
        future: Future[Result] = Future()
        deadline = None if seconds is None else time.monotonic() + seconds

        def told(how: str, what: Any) -> None:
            if future.set_running_or_notify_cancel():
                if how == "failed":
                    future.set_exception(what)
                else:
                    future.set_result(what)

        ticket = Ticket(tenant, lambda check: steps, told, deadline, _look=self._look)
        with self._lock:
            self.check_open()
            if (waiting := self.works_of(tenant)) >= (self.queue if most is None else most):
                raise Busy(waiting, _AGAIN_S, "pieces of work")
            self._put_off(self._works, ticket)
        future.add_done_callback(lambda done: ticket.give_up() if done.cancelled() else None)
        return future

    def works_of(self, tenant: str) -> int:
        """How many of a tenant's pieces of work wait, or are under way."""
        with self._lock:
            return self._works.of(tenant) + (self._at is not None and self._at.tenant == tenant)

    def call(self, work: Callable[[], Result], *, tenant: str | None = None) -> Future[Result]:
        """Do this on the engine's thread, in one step: behind what nobody waits for, or, for a
        ``tenant``, as ``background`` does."""

        def once() -> Generator[object, None, Result]:
            yield from ()
            return work()

        if tenant is not None:
            return self.background(once(), tenant=tenant)
        future: Future[Result] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._ending:
                    raise GivenUp
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self.check_open()
            self._put_off(self._later, do)
        return future

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
            for ticket in self._works:
                if ticket.begun is None:
                    ticket.give_up()
            if not self._idle.wait_for(self._is_idle, seconds):
                self._ending = True
                at = [] if self._at is None else [self._at]
                for ticket in (*self._active, *self._waiting, *self._works, *at):
                    ticket.give_up()
                self._idle.wait_for(self._is_idle, _STUCK_S)
            self._closed = True
            self._look()
        for thread in self._threads:
            thread.join(_STUCK_S)

    def _is_idle(self) -> bool:
        return not (
            self._active or self._later or self._waiting or self._works or self._at is not None
        )

    def _goes_on(self) -> bool:
        """Whether there is long work, and time for it."""
        return bool(self._meanwhile) and not self._draining

    def _look(self) -> None:
        """Something has changed that either thread may have to act upon."""
        with self._lock:
            self._work.notify()
            self._clock.notify()

    def check_open(self) -> None:
        """Raise Closing where nothing more is taken."""
        if self._draining:
            raise Closing

    def _put_off(self, queue: deque[Callable[[], object]] | Waiting, work: Any) -> None:
        if not (self._later or self._meanwhile or self._works):
            self._due = max(self._due, time.monotonic() + self.patience_s)
        if isinstance(queue, Waiting):
            queue.add(work)
        else:
            queue.append(work)
        self._look()

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
        for ticket in list(self._works):
            self._end_work(ticket, "failed", GivenUp())
        while self._later:
            self._later.popleft()()

    def _watch(self) -> None:
        """Tell their end to those that wait in vain: too late, or given up."""
        while True:
            with self._lock:
                over = self._waiting.over() + self._works.over()
                if self._is_idle():
                    self._idle.notify_all()
                if not over:
                    if self._closed:
                        return
                    next_ = self._waiting.next_deadline(), self._works.next_deadline()
                    deadline = min((one for one in next_ if one is not None), default=None)
                    left = None if deadline is None else deadline - time.monotonic()
                    self._clock.wait(left if left is None else max(0.001, left))
            for ticket, error in over:
                self._tell(ticket, "failed", error)

    def _next(self) -> Callable[[], None]:
        """What to do now, taken out of where it waits; there is something."""
        over = next((t for t in self._active if t.over() is not None), None)
        if over is not None:
            return partial(self._step, over)
        if gone := self._works.over(begun=True):
            return partial(self._end_works, gone)
        can_wait = self._later or self._works or self._goes_on()
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
        self._pieces += 1
        long = self._goes_on() and self._pieces % _LONG == 0
        if long or not (self._later or self._works):
            return partial(self._do, self._meanwhile.popleft(), True)
        if self._later and (not self._works or self._pieces % 2):
            return partial(self._do, self._later.popleft(), False)
        ticket = self._works.take(lambda tenant: True)
        assert ticket is not None
        self._at = ticket
        ticket.begun = ticket.begun or time.monotonic()
        return partial(self._piece, ticket)

    def _piece(self, ticket: Ticket) -> None:
        """A step of work that somebody waits for."""
        began = time.monotonic()
        try:
            ticket.check()
            if ticket._steps is None:
                ticket._steps = iter(ticket.run(ticket.check))
            next(ticket._steps)
        except StopIteration as end:
            self._end_work(ticket, "done", end.value)
        except BaseException as error:
            self._end_work(ticket, "failed", error)
        else:
            with self._lock:
                self._at = None
                self._works.put_back(ticket)
        with self._lock:
            self._due = began + (time.monotonic() - began) / _SHARE

    def _end_works(self, gone: list[tuple[Ticket, Exception]]) -> None:
        for ticket, error in gone:
            self._end_work(ticket, "failed", error)

    def _end_work(self, ticket: Ticket, how: str, what: Any) -> None:
        self._close_steps(ticket)
        self._tell(ticket, how, what)
        with self._lock:
            if self._at is ticket:
                self._at = None

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
        self._close_steps(ticket)
        with self._lock:
            self._active.remove(ticket)
        self._tell(ticket, how, error)

    def _close_steps(self, ticket: Ticket) -> None:
        steps, ticket._steps = ticket._steps, iter(())
        try:
            if (close := getattr(steps, "close", None)) is not None:
                close()
        except BaseException:
            logger.exception("a question could not be closed")

    def _tell(self, ticket: Ticket, how: str, what: Any) -> None:
        """Tell, and log what the listener raises: it must not end the thread that all share."""
        try:
            ticket.told(how, what)
        except BaseException:
            logger.exception("a question could not be told of its %s", how)
            ticket.give_up()
