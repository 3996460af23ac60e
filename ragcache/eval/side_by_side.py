"""Questions answered in several modes over the same prompts, and how the modes compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import mean

from ragcache.blend.base import Blender
from ragcache.eval.dataset import Question
from ragcache.eval.metrics import exact_match
from ragcache.rag import RagCache
from ragcache.types import Answer, Sampling

__all__ = ["FULL", "Comparison", "ModeFigures", "ask_side_by_side", "mode_figures"]

FULL = "full"  # the label of full prefill, which the other modes are compared with


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question, answered in every mode over the same prompt."""

    question: Question
    answers: Mapping[str, Answer]  # by the mode's label; one of them is FULL

    def is_right(self, mode: str) -> bool:
        """Whether the answer contains one of the correct answers, as whole words."""
        text = _words(self.answers[mode].text)
        return any(_words(answer) in text for answer in self.question.answers)

    def is_same(self, mode: str) -> bool:
        """Whether the answer is that of full prefill: the same text after normalisation, or both
        contain a correct answer."""
        alike = exact_match(self.answers[mode].text, [self.answers[FULL].text])
        return alike or (self.is_right(mode) and self.is_right(FULL))

    def times_sooner(self, mode: str) -> float:
        """TTFT of full prefill, divided by that of ``mode``."""
        return self.answers[FULL].report.ttft_s / self.answers[mode].report.ttft_s


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """Figures of one mode: means over the questions, and counts of them."""

    mode: str
    questions: int
    ttft_s: float
    times_sooner: float  # than full prefill: mean TTFT of full prefill / mean TTFT of this mode
    charged: float  # share of chunk tokens computed, mean over layers
    bytes_loaded: float  # per question
    right: int  # number of answers that contain a correct one
    same: int  # number of answers that are those of full prefill
    chunks: float  # of a prompt
    leading_chunks: float  # of them, loaded and not recomputed, before the first that was computed
    lost: Comparison | None  # the first question whose answer is not that of full prefill


def ask_side_by_side(
    cache: RagCache,
    questions: Sequence[Question],
    modes: Mapping[str, Blender],
    *,
    sampling: Sampling,
    top_k: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Comparison]:
    """Ask every question in every mode; yields after each question.

    All modes answer a question before the next one is asked, and they take turns at being the
    first. Each mode first answers over a short prompt that is not counted, so that no mode pays for
    the first use of memory and code. Chunks are retrieved. Modes that reuse KV only in its context,
    such as ``prefix``, store what they computed, for the questions that follow.
    """
    total = len(modes) * len(questions)
    for mode in modes.values() if questions else ():
        text = questions[0].text
        cache.ask(text, mode=mode, top_k=1, sampling=Sampling(max_tokens=1), keep=False)
    labels, done = list(modes), 0
    for number, question in enumerate(questions):
        first = number % len(labels)
        given: dict[str, Answer] = {}
        for label in labels[first:] + labels[:first]:
            given[label] = cache.ask(
                question.text,
                mode=modes[label],
                top_k=top_k,
                sampling=sampling,
                keep=modes[label].reuses == "in_context",
            )
            done += 1
            if progress is not None:
                progress(done, total)
        yield Comparison(question, {label: given[label] for label in labels})


def mode_figures(compared: Sequence[Comparison]) -> list[ModeFigures]:
    """The figures of every mode over all questions, of which there is at least one."""
    return [_figures(mode, compared) for mode in compared[0].answers]


def _figures(mode: str, compared: Sequence[Comparison]) -> ModeFigures:
    reports = [one.answers[mode].report for one in compared]
    ttft_s = mean(report.ttft_s for report in reports)
    return ModeFigures(
        mode=mode,
        questions=len(compared),
        ttft_s=ttft_s,
        times_sooner=mean(one.answers[FULL].report.ttft_s for one in compared) / ttft_s,
        charged=mean(report.charged_share for report in reports),
        bytes_loaded=mean(report.bytes_loaded for report in reports),
        right=sum(one.is_right(mode) for one in compared),
        same=sum(one.is_same(mode) for one in compared),
        chunks=mean(len(report.chunks) for report in reports),
        leading_chunks=mean(
            sum(1 for _ in takewhile(lambda chunk: chunk.charged == 0, report.chunks))
            for report in reports
        ),
        lost=next((one for one in compared if not one.is_same(mode)), None),
    )


def _words(text: str) -> str:
    """The words of a text in lower case, each with a space before and after it. Commas within
    numbers are left out."""
    joined = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    return " ".join(["", *re.findall(r"\w+", joined), ""])
