"""Futures in sequence."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TypeVar

_A = TypeVar("_A")
_B = TypeVar("_B")


def chain_futures(first: Future[_A], then: Callable[[_A], Future[_B]]) -> Future[_B]:
    """A future for the result of ``then(first.result())``. Cancelling it cancels whichever of the
    two is running; an exception of either becomes its exception."""
    chained: Future[_B] = Future()

    def on_second_done(done: Future[_B]) -> None:
        try:
            result = done.result()
        except CancelledError:
            return
        except Exception as error:
            fail(error)
        else:
            if chained.set_running_or_notify_cancel():
                chained.set_result(result)

    def fail(error: Exception) -> None:
        if chained.set_running_or_notify_cancel():
            chained.set_exception(error)

    def on_first_done(done: Future[_A]) -> None:
        try:
            second = then(done.result())
        except CancelledError:
            return
        except Exception as error:
            return fail(error)
        chained.add_done_callback(lambda one: second.cancel() if one.cancelled() else None)
        second.add_done_callback(on_second_done)

    chained.add_done_callback(lambda one: first.cancel() if one.cancelled() else None)
    first.add_done_callback(on_first_done)
    return chained
