"""The order of requests, and what happens to those that wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import pytest

from ragcache.api.scheduler import Scheduler
from ragcache.api.ticket_queue import QueueFull, RequestCancelled, ShuttingDown, Ticket, TicketQueue
from tests.api.scene import SOON, Heard, Held, NewThreads, pieces


@pytest.fixture
def scheduler(new_threads: NewThreads) -> Iterator[Scheduler]:
    made = Scheduler(queue=4, streams=2, background_delay_s=SOON)
    yield made
    made.close(0)
    assert not new_threads()


def test_first_tokens_go_before_further_ones(scheduler: Scheduler) -> None:
    log: list[str] = []
    heard = [Heard(name, log) for name in "ab"]
    with Held(scheduler):
        for one in heard:
            scheduler.submit("t", pieces(3), one)
    assert [one.end() for one in heard] == ["done", "done"]
    assert log == ["a1", "b1", "a2", "b2", "a3", "b3"]


def test_tenants_take_turns(scheduler: Scheduler) -> None:
    log: list[str] = []
    heard = []
    with Held(scheduler):
        for number in range(4):
            heard.append(Heard(f"flood{number}.", log))
            scheduler.submit("flood", pieces(1), heard[-1])
        for tenant in ("b", "c"):
            heard.append(Heard(tenant, log))
            scheduler.submit(tenant, pieces(1), heard[-1])
    assert {one.end() for one in heard} == {"done"}
    assert [name.split(".")[0].rstrip("1") for name in log][:3] == ["flood0", "b", "c"]


def test_a_tenant_with_nothing_under_way_finds_a_place(scheduler: Scheduler) -> None:
    """Beside two endless answers of another, which is as many as there may be of one."""
    going = threading.Event()

    def endless(check: Callable[[], None]) -> Iterator[int]:
        while not going.is_set():
            check()
            yield 0

    long = [Heard() for _ in range(2)]
    for one in long:
        scheduler.submit("long", endless, one)
        assert one.begun.wait(SOON)
    third, other = Heard(), Heard()
    scheduler.submit("long", pieces(1), third)
    scheduler.submit("other", pieces(3), other)
    assert other.end() == "done" and not third.pieces
    assert scheduler.depth() == (1, 2)
    going.set()
    assert [one.end() for one in (*long, third)] == ["done"] * 3


def test_each_tenant_has_a_queue_of_its_own(scheduler: Scheduler) -> None:
    with Held(scheduler):
        for _ in range(4):
            scheduler.submit("flood", pieces(1), Heard())
        with pytest.raises(QueueFull) as busy:
            scheduler.submit("flood", pieces(1), Heard())
        assert 1 <= busy.value.retry_after_s <= 60
        other = Heard()
        scheduler.submit("other", pieces(1), other)
        assert scheduler.depth() == (5, 0)
    assert other.end() == "done"


def test_the_wait_that_is_advised_follows_what_questions_take(scheduler: Scheduler) -> None:
    scheduler._request_s = 3.0
    with Held(scheduler):
        for tenant in "tu":
            for _ in range(4):
                scheduler.submit(tenant, pieces(1), Heard())
        with pytest.raises(QueueFull) as busy:
            scheduler.submit("t", pieces(1), Heard())
        assert busy.value.retry_after_s == pytest.approx(24.0)
        scheduler._request_s = 100.0
        with pytest.raises(QueueFull) as busy:
            scheduler.submit("t", pieces(1), Heard())
        assert busy.value.retry_after_s == 60.0


def test_who_waits_is_told_in_time_though_the_engine_is_at_a_step(scheduler: Scheduler) -> None:
    late, gone, other = Heard(), Heard(), Heard()
    with Held(scheduler):
        scheduler.submit("t", pieces(1), late, seconds=0.02)
        ticket = scheduler.submit("t", pieces(1), gone)
        scheduler.submit("t", pieces(1), other, seconds=SOON)
        ticket.cancel()
        assert (late.end(), gone.end()) == ("DeadlineExceeded", "RequestCancelled")
        assert scheduler.depth() == (1, 0)  # their places are free
    assert other.end() == "done"


def test_a_running_question_ends_at_its_next_check(scheduler: Scheduler) -> None:
    inside, closed = threading.Event(), threading.Event()

    def layers(check: Callable[[], None]) -> Iterator[int]:
        try:
            inside.set()
            while True:  # layers of a prefill: nothing is yielded
                check()
                time.sleep(0.001)
        finally:
            closed.set()
        yield 0

    heard, late = Heard(), Heard()
    ticket = scheduler.submit("t", layers, heard)
    assert inside.wait(SOON)
    ticket.cancel()
    assert heard.end() == "RequestCancelled" and closed.is_set()
    scheduler.submit("t", layers, late, seconds=0.05)
    assert late.end() == "DeadlineExceeded"
    assert scheduler.depth() == (0, 0)


def test_what_is_given_up_between_two_steps_gives_its_place_first(scheduler: Scheduler) -> None:
    log: list[str] = []
    first, second = Heard("a", log), Heard("b", log)
    ticket = scheduler.submit("t", pieces(10**9), first)
    assert first.begun.wait(SOON)
    with scheduler._lock:  # the engine comes to no next step meanwhile
        scheduler.submit("t", pieces(1), second)
        ticket.cancel()
        chosen = scheduler._next()
    assert isinstance(chosen, partial) and chosen.args == (ticket,)
    assert first.end() == "RequestCancelled" and second.end() == "done"


def test_errors_end_one_question_and_no_more(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(check: Callable[[], None]) -> Iterator[int]:
        yield 1
        raise RuntimeError("broken")

    def deaf(how: str, what: object) -> None:
        raise OSError("gone")

    class Sticky(Generator[int, None, None]):
        def send(self, value: None) -> int:
            raise StopIteration

        def throw(self, *error: Any) -> int:
            raise StopIteration

        def close(self) -> None:
            raise RuntimeError("does not close")

    heard, sticky, after = Heard(), Heard(), Heard()
    scheduler.submit("t", fails, heard)
    assert (heard.end(), heard.pieces) == ("RuntimeError", [1])
    scheduler.submit("t", pieces(10**9), deaf)
    scheduler.submit("t", lambda check: Sticky(), sticky)
    scheduler.submit("t", pieces(1), after)
    assert sticky.end() == after.end() == "done"
    assert {"a request failed", "a request could not be closed"} <= set(caplog.messages)


def test_what_can_wait_waits(scheduler: Scheduler) -> None:
    log: list[str] = []

    def step() -> bool:
        log.append("step")
        return log.count("step") < 2

    submitted = threading.Event()

    def answer(check: Callable[[], None]) -> Iterator[int]:
        yield 1
        assert submitted.wait(SOON)
        yield 2

    heard = Heard("q", log)
    scheduler.submit("t", answer, heard)
    scheduler.submit_recurring(step)
    scheduler.submit_idle(lambda: log.append("later"))
    submitted.set()
    assert heard.end() == "done"
    scheduler.call(lambda: None).result(SOON)
    while log.count("step") < 2:
        time.sleep(0.001)
    assert log == ["q1", "q2", "later", "step", "step"]


class Panic(BaseException):
    """As libraries in Rust raise: no Exception."""


def test_nothing_that_is_raised_ends_the_thread_that_all_share(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    def panics(*_: object) -> Any:
        raise Panic("a panic")
        yield

    heard = Heard("q", [])
    scheduler.submit("t", panics, heard)
    assert heard.end() == "RuntimeError"
    scheduler.submit_idle(lambda: next(panics()))
    scheduler.submit_recurring(lambda: next(panics()))
    with pytest.raises(Panic):
        scheduler.submit_background(panics()).result(SOON)

    def deaf(how: str, what: object) -> None:
        raise Panic

    scheduler.submit("t", pieces(2), deaf)
    after = Heard("q", [])
    scheduler.submit("t", pieces(2), after)
    assert after.end() == "done"
    assert "a panic" in caplog.text and all(thread.is_alive() for thread in scheduler._threads)


def test_what_can_wait_is_not_taken_once_all_ends(scheduler: Scheduler) -> None:
    ran: list[int] = []
    scheduler.close()
    assert not scheduler.submit_idle(lambda: ran.append(1))
    assert not ran and not scheduler._idle


def test_what_can_wait_does_not_wait_for_ever() -> None:
    """With a question always there, it has a turn, and then not at once another."""
    scheduler = Scheduler(background_delay_s=0.0)
    log: list[str] = []

    def work() -> None:
        log.append("work")
        time.sleep(0.05)

    endless = Heard("q", log)
    ticket = scheduler.submit("t", pieces(10**9), endless)
    assert endless.begun.wait(SOON)
    done = [scheduler.call(work) for _ in range(2)]
    for future in done:
        future.result(SOON)
    first, last = (i for i, what in enumerate(log) if what == "work")
    assert last - first > 10  # steps of the question in between
    ticket.cancel()
    assert endless.end() == "RequestCancelled"
    scheduler.close()


def test_work_that_can_wait_is_bounded_and_may_fail(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[int] = []
    with Held(scheduler):
        assert all(scheduler.submit_idle(lambda: ran.append(1 // 0)) for _ in range(4))
        assert not scheduler.submit_idle(lambda: ran.append(1))
        future = scheduler.call(lambda: 7)  # is not refused: somebody waits for it
    assert future.result(SOON) == 7 and not ran
    assert caplog.messages.count("idle or recurring work failed") == 4


def test_background_work_gives_or_raises_and_can_be_cancelled(scheduler: Scheduler) -> None:
    begun, closed = threading.Event(), threading.Event()

    def steps(ends: bool) -> Generator[None, None, str]:
        try:
            begun.set()
            yield
            while not ends:
                yield
            return "result"
        finally:
            closed.set()

    assert scheduler.submit_background(steps(True)).result(SOON) == "result"
    begun.clear()
    closed.clear()
    endless = scheduler.submit_background(steps(False))
    assert begun.wait(SOON) and endless.cancel() and closed.wait(SOON)
    with pytest.raises(CancelledError):
        endless.result(0)

    def fails() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        scheduler.call(fails).result(SOON)


def test_close_finishes_what_was_begun(new_threads: NewThreads) -> None:
    scheduler, heard, kept = Scheduler(), [Heard() for _ in range(3)], threading.Event()
    with Held(scheduler):
        for one in heard:
            scheduler.submit("t", pieces(3), one)
        scheduler.submit_idle(kept.set)
    scheduler.close()
    assert [one.end() for one in heard] == ["done"] * 3 and kept.is_set()
    with pytest.raises(ShuttingDown):
        scheduler.submit("t", pieces(1), Heard())
    with pytest.raises(ShuttingDown):
        scheduler.call(lambda: None)
    scheduler.close()
    assert not new_threads()


def test_close_gives_up_what_takes_too_long(new_threads: NewThreads) -> None:
    scheduler = Scheduler(streams=1)
    going, waiting = Heard(), Heard()
    scheduler.submit("t", pieces(10**9), going)
    scheduler.submit("t", pieces(1), waiting)

    def endless() -> Generator[None, None, None]:
        while True:
            yield

    future = scheduler.submit_background(endless())
    scheduler.submit_recurring(lambda: True)
    scheduler.close(0.05)
    assert (going.end(), waiting.end()) == ("RequestCancelled", "RequestCancelled")
    assert isinstance(future.exception(SOON), RequestCancelled)
    assert not new_threads()


def test_long_work_does_not_keep_it_open(new_threads: NewThreads) -> None:
    scheduler, stepped = Scheduler(), threading.Event()

    def step() -> bool:
        stepped.set()
        return True

    scheduler.submit_recurring(step)
    assert stepped.wait(SOON)
    scheduler.close()
    assert not new_threads()


def test_nobody_is_remembered() -> None:
    waiting = TicketQueue()
    for number in range(100):
        waiting.add(Ticket(f"tenant{number}", pieces(1), Heard()))
    while waiting.take(lambda tenant: True):
        pass
    assert len(waiting) == 0 and not waiting._queues


def test_many_threads_all_hear_their_end(new_threads: NewThreads) -> None:
    """Every question receives its pieces in order and one end, whatever happens to it."""
    scheduler = Scheduler(queue=8, streams=4)
    heard: list[Heard] = []
    refused: list[int] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            one = Heard(str(seed))
            seconds = rng.choice([None, 0.0, 0.002, SOON])
            try:
                ticket = scheduler.submit(
                    f"t{seed % 5}", pieces(rng.randrange(6)), one, seconds=seconds
                )
            except QueueFull:
                refused.append(seed)
                continue
            heard.append(one)
            if rng.random() < 0.3:
                ticket.cancel()
            if rng.random() < 0.2:
                scheduler.submit_idle(lambda: None)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(20)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    ends = [one.end() for one in heard]
    assert (
        set(ends) <= {"done", "RequestCancelled", "DeadlineExceeded"}
        and len(ends) + len(refused) == 800
    )
    assert all(one.pieces == list(range(len(one.pieces))) for one in heard)
    assert scheduler.depth() == (0, 0)
    scheduler.close()
    assert not new_threads()
