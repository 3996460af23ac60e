"""What processes of their own can ask without a model, and without importing the tests'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ragcache.eval.dataset import EvalContext
from ragcache.eval.outcomes import AskedQuestion


def nothing(contexts: Sequence[EvalContext]) -> Iterator[AskedQuestion]:
    """For every question, outcomes of no mode."""
    for context in contexts:
        for _ in context.questions:
            yield AskedQuestion("", {})
