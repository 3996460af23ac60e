"""What processes of their own can ask without a model, and without importing the tests'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ragcache.eval.dataset import EvalContext
from ragcache.eval.outcomes import AskedQuestion, QuestionOutcome

_NONE = (None,) * 5


def texts(contexts: Sequence[EvalContext]) -> Iterator[AskedQuestion]:
    """For every question an outcome, with the question's text for the model's name."""
    for context in contexts:
        for question in context.questions:
            outcome = QuestionOutcome(
                -1, question.kind, False, 0.0, None, *_NONE, 0.0, None, 0.0, 1.0, 0
            )
            yield AskedQuestion(question.text, {"full": outcome})
