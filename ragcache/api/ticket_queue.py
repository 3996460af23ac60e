"""Submitted work that waits for the engine, in one queue per tenant."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DeadlineExceeded"]


class ShuttingDown(Exception):
    """The scheduler accepts no more work."""


class QueueFull(Exception):
    """A tenant's queue is full. ``retry_after_s``: seconds until there should be room."""

    def __init__(self, waiting: int, retry_after_s: float, what: str = "questions") -> None:
        super().__init__(f"{waiting} {what} are waiting already")
        self.retry_after_s = retry_after_s


class RequestCancelled(Exception):
    """The client no longer waits for this answer, or the service shut down first."""


class DeadlineExceeded(Exception):
    """The request's timeout is over."""


#: Receives every event of a ticket: ("piece", text) for each step, then once ("done", result) or
#: ("failed", the exception). It is called on a thread of the scheduler, never on two at a time for
#: one ticket, and must not block.
EventCallback = Callable[[str, Any], None]


@dataclass(eq=False)
class Ticket:
    """A submitted request, or a submitted piece of background work."""

    tenant: str
    run: Callable[[Callable[[], None]], Iterator[Any]]
    on_event: EventCallback
    deadline: float | None = None  # of time.monotonic
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    _wake: Callable[[], None] = lambda: None  # wakes the scheduler's threads
    _cancelled: bool = False
    _steps: Iterator[Any] | None = None
    _engine_s: float = 0.0  # engine time spent so far

    def cancel(self) -> None:
        """End it at the next layer or token; any thread may call this. Its callback then receives
        ("failed", RequestCancelled), unless it has ended already."""
        self._cancelled = True
        self._wake()

    def check(self) -> None:
        """Raise RequestCancelled or DeadlineExceeded if it must not continue."""
        if (error := self.end_reason()) is not None:
            raise error

    def end_reason(self) -> Exception | None:
        """The exception that :meth:`check` would raise."""
        if self._cancelled:
            return RequestCancelled()
        late = self.deadline is not None and time.monotonic() > self.deadline
        return DeadlineExceeded() if late else None


class TicketQueue:
    """Tickets by tenant: tenants take turns, and each tenant's oldest ticket comes first.

    Tenants without tickets take no memory. Not thread-safe.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Ticket]] = {}  # in the order of their turns, none empty

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Ticket]:
        for queue in self._queues.values():
            yield from queue

    def add(self, ticket: Ticket) -> None:
        self._queues.setdefault(ticket.tenant, deque()).append(ticket)

    def put_back(self, ticket: Ticket) -> None:
        """Return a ticket that was taken and has not finished: it stays the first of its tenant,
        and that tenant's next turn comes after the other tenants'."""
        self._queues.setdefault(ticket.tenant, deque()).appendleft(ticket)

    def take(self, allowed: Callable[[str], bool]) -> Ticket | None:
        """Remove and return the next ticket among the tenants that are ``allowed``; its tenant
        moves to the end of the turns."""
        tenant = next(filter(allowed, self._queues), None)
        if tenant is None:
            return None
        queue = self._queues.pop(tenant)
        ticket = queue.popleft()
        if queue:
            self._queues[tenant] = queue
        return ticket

    def count(self, tenant: str) -> int:
        """The number of one tenant's tickets."""
        return len(self._queues.get(tenant, ()))

    def take_ended(self, *, started: bool = False) -> list[tuple[Ticket, Exception]]:
        """Remove the tickets that are cancelled or past their deadline, each with the reason.
        Tickets that have started are included only if ``started`` is true."""
        ended = [
            (ticket, error)
            for ticket in self
            if (started or ticket.started_at is None) and (error := ticket.end_reason()) is not None
        ]
        for ticket, _ in ended:
            self._queues[ticket.tenant].remove(ticket)
            if not self._queues[ticket.tenant]:
                del self._queues[ticket.tenant]
        return ended

    def next_deadline(self) -> float | None:
        """The earliest deadline of the tickets that have not started, of time.monotonic; None
        where there is none."""
        waiting = (t.deadline for t in self if t.deadline is not None and t.started_at is None)
        return min(waiting, default=None)
