"""Questions and work that wait, and whose turn it is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


class Closing(Exception):
    """The scheduler takes nothing more."""


class Busy(Exception):
    """A tenant's queue is full. ``retry_after_s``: when there should be room."""

    def __init__(self, waiting: int, retry_after_s: float, what: str = "questions") -> None:
        super().__init__(f"{waiting} {what} are waiting already")
        self.retry_after_s = retry_after_s


class GivenUp(Exception):
    """Nobody waits for this answer any more."""


class TooLate(Exception):
    """The time that a question was given is over."""


#: Told of every step: ("piece", text), then once ("done", None) or ("failed", the exception).
#: Called on a thread of the scheduler, for one question never on two at a time. It must not block.
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
    _look: Callable[[], None] = lambda: None  # has the scheduler look at it
    _given_up: bool = False
    _steps: Iterator[Any] | None = None
    _spent_s: float = 0.0  # of the engine's time

    def give_up(self) -> None:
        """End it at the next layer or token; may be called from any thread. It is told ("failed",
        GivenUp), unless it has ended."""
        self._given_up = True
        self._look()

    def check(self) -> None:
        """Raise GivenUp or TooLate where it should go on no longer."""
        if (error := self.over()) is not None:
            raise error

    def over(self) -> Exception | None:
        """What :meth:`check` would raise."""
        if self._given_up:
            return GivenUp()
        late = self.deadline is not None and time.monotonic() > self.deadline
        return TooLate() if late else None


class Waiting:
    """Tickets by tenant: tenants take turns, and of one tenant the oldest comes first.

    It remembers nobody who has nothing in it. Not thread-safe.
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
        """One that was taken, and is not through: the first of its tenant, whose turn is after the
        others'."""
        self._queues.setdefault(ticket.tenant, deque()).appendleft(ticket)

    def take(self, may: Callable[[str], bool]) -> Ticket | None:
        """Take the ticket whose turn it is, of the tenants that ``may``; that tenant is last in
        turn then."""
        tenant = next(filter(may, self._queues), None)
        if tenant is None:
            return None
        queue = self._queues.pop(tenant)
        ticket = queue.popleft()
        if queue:
            self._queues[tenant] = queue
        return ticket

    def of(self, tenant: str) -> int:
        """How many of one tenant's there are."""
        return len(self._queues.get(tenant, ()))

    def over(self, *, begun: bool = False) -> list[tuple[Ticket, Exception]]:
        """Take out those that are too late or given up, each with the reason; those that were
        ``begun`` only where that is asked for."""
        gone = [
            (ticket, error)
            for ticket in self
            if (begun or ticket.begun is None) and (error := ticket.over()) is not None
        ]
        for ticket, _ in gone:
            self._queues[ticket.tenant].remove(ticket)
            if not self._queues[ticket.tenant]:
                del self._queues[ticket.tenant]
        return gone

    def next_deadline(self) -> float | None:
        """Of those that were not begun, of time.monotonic; None where there is none."""
        waiting = (t.deadline for t in self if t.deadline is not None and t.begun is None)
        return min(waiting, default=None)
