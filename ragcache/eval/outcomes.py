"""What a question's answers are measured by: outcomes by mode, before they are summarised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ragcache.blend.base import Blender


@dataclass(frozen=True, slots=True)
class QuestionOutcome:
    """One question answered in one mode. Comparisons with full prefill are None without it."""

    context: int  # number of its context; questions of one context are not independent
    kind: str
    exact: bool
    f1: float
    rouge_l: float | None  # None if the data set's answers are short
    kl: float | None  # KL(full || mode) at the first answer token, nats
    agrees: bool | None  # the most likely first token is that of full prefill
    answer_kl: float | None  # KL(full || mode), mean over the tokens of full prefill's answer, nats
    answer_top1: float | None  # share of those tokens at which both have the same most likely one
    same: bool | None  # the answer is that of full prefill, by exact match
    ttft_s: float
    speedup: float | None  # TTFT of full prefill / TTFT of this mode, on this question
    recomputed: float  # share of chunk tokens, mean over layers that are not computed in full
    charged: float  # share of chunk tokens computed, mean over all layers
    bytes_loaded: int
    same_start: bool | None = None  # its first START_TOKENS tokens are those of full prefill
    margin: float | None = None  # of the first token: its highest logit minus the second highest


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question answered in every mode."""

    model: str  # digest of the model's fingerprint
    outcomes: dict[str, QuestionOutcome]  # by label of the mode


@dataclass(frozen=True, slots=True)
class ModeOutcomes:
    """Outcomes of one mode, by question; all modes have the same questions in the same order."""

    mode: str  # its label
    method: str
    parameters: Mapping[str, Any]
    outcomes: list[QuestionOutcome] = field(default_factory=list)

    @classmethod
    def of(cls, mode: str, blender: Blender) -> Self:
        """No outcomes yet, of a mode with this label."""
        return cls(mode, blender.mode, blender.parameters)


def by_mode(modes: Mapping[str, Blender], asked: Iterable[AskedQuestion]) -> list[ModeOutcomes]:
    """The outcomes of each of ``modes``, by label."""
    made = [ModeOutcomes.of(label, blender) for label, blender in modes.items()]
    for question in asked:
        for one in made:
            one.outcomes.append(question.outcomes[one.mode])
    return made
