"""Evaluate contexts in several processes, each with its own model and cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

from ragcache.eval.dataset import EvalContext
from ragcache.eval.summary import ModeOutcomes, QuestionOutcome
from ragcache.types import Progress

#: Evaluates contexts and reports progress. It is pickled for another process.
_EvaluateContexts = Callable[[Sequence[EvalContext], Progress], list[ModeOutcomes]]
_POLL_S = 0.2


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(
    run: _EvaluateContexts, contexts: Sequence[EvalContext], processes: int, progress: Progress
) -> list[ModeOutcomes]:
    """The results of ``run`` for all ``contexts``, evaluated by ``processes`` at once.

    ``progress`` is called before a model is loaded, and after every question. Raises what ``run``
    raises in any process, after ending the other ones.
    """
    parts = _parts(contexts, processes)
    total = sum(len(context.questions) for context in contexts)
    progress(0, total)
    if len(parts) == 1:
        return run(contexts, progress)
    spawned = multiprocessing.get_context("spawn")
    counts = spawned.Array("q", len(parts))
    threads = max(1, usable_cores() // len(parts))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        len(parts), spawned, initializer=_begin, initargs=(counts, threads)
    ) as pool:
        try:
            futures = [pool.submit(_run, run, part, number) for number, part in enumerate(parts)]
            waiting: set[Any] = set(futures)
            while waiting:
                done, waiting = wait(waiting, _POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises its error before the others are done
                progress(sum(counts[:]), total)
            return _joined([future.result() for future in futures])
        except BaseException:  # do not wait for the other parts
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _parts(contexts: Sequence[EvalContext], processes: int) -> list[list[EvalContext]]:
    """Divide contexts evenly; those with the same chunks stay together."""
    by_chunks: dict[tuple[str, ...], list[EvalContext]] = {}
    for context in contexts:
        by_chunks.setdefault(context.chunks, []).append(context)
    groups = list(by_chunks.values())
    shares = (groups[number::processes] for number in range(processes))
    return [[context for group in part for context in group] for part in shares if part]


def _joined(parts: Sequence[list[ModeOutcomes]]) -> list[ModeOutcomes]:
    """Join the outcomes of all parts by mode, renumbering contexts."""
    joined: list[list[QuestionOutcome]] = [[] for _ in parts[0]]
    first = 0
    for part in parts:
        for outcomes, one in zip(joined, part, strict=True):
            outcomes.extend(replace(o, context=o.context + first) for o in one.outcomes)
        first += 1 + max(outcome.context for outcome in part[0].outcomes)
    return [replace(one, outcomes=outcomes) for one, outcomes in zip(parts[0], joined, strict=True)]


_counts: Any = None  # in a spawned process: shared array of questions done, by part


def _begin(counts: Any, threads: int) -> None:
    import torch

    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end on Ctrl-C without a traceback
    torch.set_num_threads(threads)


def _run(run: _EvaluateContexts, part: Sequence[EvalContext], number: int) -> list[ModeOutcomes]:
    def progress(done: int, total: int) -> None:
        _counts[number] = done

    return run(part, progress)
