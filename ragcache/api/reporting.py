"""A Report as JSON: what the API answers in its ``ragcache`` field, and what the page draws."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ragcache.types import Answer


def report_json(answer: Answer) -> dict[str, Any]:
    """What was reused for an answer and what it cost, in values that JSON has.

    The fields of :class:`ragcache.types.Report`, and ``passages``: id and score of every chunk. No
    text of documents.
    """
    found = asdict(answer.report)
    found["parameters"] = dict(answer.report.parameters)
    found["passages"] = [{"id": p.chunk.id, "score": p.score} for p in answer.passages]
    return found
