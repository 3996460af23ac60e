"""Evaluate contexts in several processes, each with its own model and cores."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from typing import Any

from ragcache.eval.dataset import EvalContext
from ragcache.eval.outcomes import AskedQuestion
from ragcache.types import Progress
from ragcache.util.cores import usable_cores

#: Answers the questions of contexts, in order. It is pickled for another process.
_AskQuestions = Callable[[Sequence[EvalContext]], Iterator[AskedQuestion]]
#: A question's number, in a sequence of contexts, and its outcomes.
_Numbered = tuple[int, AskedQuestion]
_POLL_S = 0.2


def run_parallel(
    ask: _AskQuestions,
    contexts: Sequence[EvalContext],
    processes: int,
    progress: Progress,
    *,
    known: Mapping[int, AskedQuestion] | None = None,
    keep: Callable[[int, AskedQuestion], None] | None = None,
) -> list[AskedQuestion]:
    """Every question of ``contexts``, in order, as ``ask`` answers it, in ``processes`` at once.

    ``known``: questions that are answered already, by number. ``keep`` is called with the number
    of every other one and its outcomes, as soon as they are there. ``progress`` is called before a
    model is loaded, and after every question. Contexts are numbered by their chunks. Raises what
    ``ask`` raises in any process, after ending the other ones.
    """
    numbers: dict[tuple[str, ...], int] = {}
    of = [
        numbers.setdefault(context.chunks, len(numbers))
        for context in contexts
        for _ in context.questions
    ]
    asked = dict(known or {})
    left, places = _unanswered(contexts, asked)
    progress(len(asked), len(of))
    with closing(_in_processes(ask, left, processes)) as arriving:
        for place, question in arriving:
            number = places[place]
            asked[number] = _in_context(question, of[number])
            if keep is not None:
                keep(number, asked[number])
            progress(len(asked), len(of))
    return [asked[number] for number in range(len(of))]


def _unanswered(
    contexts: Sequence[EvalContext], known: Mapping[int, AskedQuestion]
) -> tuple[list[EvalContext], list[int]]:
    """The contexts with those of their questions that are not ``known``, and the questions'
    numbers."""
    left, places, number = [], [], 0
    for context in contexts:
        numbers = range(number, number + len(context.questions))
        number = numbers.stop
        new = [n for n in numbers if n not in known]
        if new:
            questions = tuple(context.questions[n - numbers.start] for n in new)
            left.append(EvalContext(context.chunks, questions))
            places += new
    return left, places


def _in_context(question: AskedQuestion, context: int) -> AskedQuestion:
    outcomes = {label: replace(o, context=context) for label, o in question.outcomes.items()}
    return replace(question, outcomes=outcomes)


def _in_processes(
    ask: _AskQuestions, contexts: Sequence[EvalContext], processes: int
) -> Generator[_Numbered, None, None]:
    """The questions of ``contexts`` as they are answered."""
    parts = _parts(contexts, processes)
    if len(parts) < 2:
        yield from enumerate(ask(contexts) if contexts else ())
        return
    ends = list(accumulate(len(context.questions) for context in contexts))
    spawned = multiprocessing.get_context("spawn")
    answered = spawned.SimpleQueue()
    threads = max(1, usable_cores() // len(parts))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        len(parts), spawned, initializer=_begin, initargs=(answered, threads)
    ) as pool:
        try:
            waiting: set[Any] = set()
            for part in parts:
                numbers = [
                    n for c in part for n in range(ends[c] - len(contexts[c].questions), ends[c])
                ]
                waiting.add(pool.submit(_ask, ask, [contexts[c] for c in part], numbers))
            while waiting:
                done, waiting = wait(waiting, _POLL_S, FIRST_EXCEPTION)
                while not answered.empty():
                    yield answered.get()
                for future in done:
                    future.result()  # raises its error before the others are done
        except BaseException:  # do not wait for the other parts
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _parts(contexts: Sequence[EvalContext], processes: int) -> list[list[int]]:
    """Divide contexts evenly, by number; those with the same chunks stay together."""
    by_chunks: dict[tuple[str, ...], list[int]] = {}
    for number, context in enumerate(contexts):
        by_chunks.setdefault(context.chunks, []).append(number)
    groups = list(by_chunks.values())
    shares = (groups[number::processes] for number in range(processes))
    return [[number for group in part for number in group] for part in shares if part]


_answered: Any = None  # in a spawned process: the queue that answered questions are put into


def _begin(answered: Any, threads: int) -> None:
    import torch

    global _answered
    _answered = answered
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end on Ctrl-C without a traceback
    torch.set_num_threads(threads)


def _ask(ask: _AskQuestions, part: Sequence[EvalContext], numbers: Sequence[int]) -> None:
    for number, question in zip(numbers, ask(part), strict=True):
        _answered.put((number, question))  # written to a pipe before the next one is asked
