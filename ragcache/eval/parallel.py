"""Questions shared out to several processes, each with a model and cores of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

from ragcache.errors import ConfigError
from ragcache.eval.dataset import EvalContext
from ragcache.eval.summary import ModeOutcomes, QuestionOutcome
from ragcache.types import Progress

#: Scores of some contexts; runs in a process of its own, so it must be importable there.
_ScoreContexts = Callable[[Sequence[EvalContext], Progress], list[ModeOutcomes]]
_POLL_S = 0.2


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(processes: int) -> None:
    """Raise ConfigError where there are none."""
    if processes < 1:
        raise ConfigError(f"processes is {processes}: it takes at least 1")


def run_parallel(
    run: _ScoreContexts, contexts: Sequence[EvalContext], processes: int, progress: Progress
) -> list[ModeOutcomes]:
    """What ``run`` gives for all ``contexts``, done by ``processes`` at a time.

    ``progress`` is told before a model is loaded, and after every question.
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
                    future.result()  # raises what it raised, before the others are through
                progress(sum(counts[:]), total)
            return _joined([future.result() for future in futures])
        except BaseException:  # the pool would wait for parts that nobody wants any more
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _parts(contexts: Sequence[EvalContext], processes: int) -> list[list[EvalContext]]:
    """Contexts dealt out evenly; those over the same chunks stay together."""
    alike: dict[tuple[str, ...], list[EvalContext]] = {}
    for context in contexts:
        alike.setdefault(context.chunks, []).append(context)
    groups = list(alike.values())
    dealt = (groups[number::processes] for number in range(processes))
    return [[context for group in part for context in group] for part in dealt if part]


def _joined(parts: Sequence[list[ModeOutcomes]]) -> list[ModeOutcomes]:
    """The same modes over all parts; contexts are numbered on from part to part."""
    joined: list[list[QuestionOutcome]] = [[] for _ in parts[0]]
    first = 0
    for part in parts:
        for outcomes, one in zip(joined, part, strict=True):
            outcomes.extend(replace(o, context=o.context + first) for o in one.outcomes)
        first += 1 + max(outcome.context for outcome in part[0].outcomes)
    return [replace(one, outcomes=outcomes) for one, outcomes in zip(parts[0], joined, strict=True)]


_counts: Any = None  # in a spawned process: questions done, per part


def _begin(counts: Any, threads: int) -> None:
    import torch

    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches us too: end without a traceback
    torch.set_num_threads(threads)


def _run(run: _ScoreContexts, part: Sequence[EvalContext], number: int) -> list[ModeOutcomes]:
    def progress(done: int, total: int) -> None:
        _counts[number] = done

    return run(part, progress)
