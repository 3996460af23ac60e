"""One future behind another."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def chained(first: Future[A], then: Callable[[A], Future[B]]) -> Future[B]:
    """What ``then`` makes of the result of ``first``, once it is there; cancelled, it cancels
    whichever of the two is under way. What either raises, it has."""
    whole: Future[B] = Future()

    def end(done: Future[B]) -> None:
        try:
            result = done.result()
        except CancelledError:
            return
        except Exception as error:
            fail(error)
        else:
            if whole.set_running_or_notify_cancel():
                whole.set_result(result)

    def fail(error: Exception) -> None:
        if whole.set_running_or_notify_cancel():
            whole.set_exception(error)

    def go_on(done: Future[A]) -> None:
        try:
            second = then(done.result())
        except CancelledError:
            return
        except Exception as error:
            return fail(error)
        whole.add_done_callback(lambda one: second.cancel() if one.cancelled() else None)
        second.add_done_callback(end)

    whole.add_done_callback(lambda one: first.cancel() if one.cancelled() else None)
    first.add_done_callback(go_on)
    return whole
