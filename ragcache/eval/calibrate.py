"""Choose a mode and a ratio without labels: the cheapest that keeps full prefill's answers.

Either on the questions that were asked (:func:`cheapest`), or, as a promise with a stated error, on
all questions like them (:func:`candidate_tests`).

With *escalation*, an answer is computed by full prefill, before anything of it is streamed, if the
margin of its first token is below a least one. It then agrees by construction, so the risk is that
of an answer which is not escalated and disagrees. The least margins of a mode at one ratio are a
sequence for :mod:`ragcache.eval.promise`, from the most cautious down: beyond its beginning, all
are escalated and none disagrees, and the risk can only rise from each to the next, so that many of
them cost nothing. The ratios of a mode are a chain of such sequences. One sequence through all
ratios would spend nothing on their number either, but it ends at the first ratio that cannot be
promised without escalation, and the low ratios, which escalation is for, come after it. With the
chain they are tested at their own share in any case, and at those of the larger ratios too if none
of these needs escalation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby, product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragcache.blend import Blender, blender
from ragcache.blend.ape import APE
from ragcache.blend.base import check_ratio
from ragcache.blend.full import Full
from ragcache.core.calibration import Calibration, is_uncertain
from ragcache.errors import ConfigError
from ragcache.eval.dataset import EvalContext, Question, read_questions, spread_questions
from ragcache.eval.evaluate import ask_all
from ragcache.eval.outcomes import ModeOutcomes, QuestionOutcome
from ragcache.eval.promise import Promise, Trial, upper_bound
from ragcache.eval.summary import ModeSummary, figures
from ragcache.settings import Settings
from ragcache.types import Disagreement, Fingerprint
from ragcache.util.list_argument import require_list

if TYPE_CHECKING:
    from ragcache.planning.context import EncodingContext
    from ragcache.rag import RagCache

__all__ = [
    "CandidateTest",
    "calibrate",
    "candidates",
    "cheapest",
    "cheapest_promised",
    "one_per_context",
    "retrieve_contexts",
    "settings_of_store",
]

#: The ratios that are tried for a mode that takes a ratio and does not name one.
RATIOS = 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5
#: The least margins that are tried with escalation, in logits; fixed before questions are asked.
MARGINS = (
    *(16.0, 12.0, 10.0, 8.0, 7.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25),
    *(1.0, 0.75, 0.5, 0.25, 0.0),
)
_STEPS = 0.6, 0.7, 0.8, 0.9, 1.0


def _ape_grid() -> dict[str, Blender]:
    """APE with temperatures and scales from 0.6 to 1, by label: the authors' search range."""
    return {f"ape:temperature={t},scale={s}": APE(t, s) for t, s in product(_STEPS, _STEPS)}


def candidates(modes: Sequence[str]) -> dict[str, Blender]:
    """Blenders by label: each mode at all of :data:`RATIOS` (``fused@0.05``).

    ``ape`` is tried on a grid of its parameters. A mode that takes no ratio, or names its own, is
    tried as it is. Raises ConfigError for an unknown mode, and for full prefill.
    """
    made: dict[str, Blender] = {}
    for name in require_list(modes, "modes"):
        plain = blender(name)
        if plain.reuses == "nothing":
            raise ConfigError(
                f"mode {name} is what others are compared with: name another mode, such as fused"
            )
        if name == "ape":
            made |= _ape_grid()
        elif plain.ratio is not None and "recompute_ratio" not in name:
            made |= {f"{name}@{ratio:g}": blender(name, ratio) for ratio in RATIOS}
        else:
            made[name] = plain
    return made


def retrieve_contexts(path: Path, cache: RagCache) -> list[EvalContext]:
    """The questions of a text file, one per line, each with the chunks that ``cache`` retrieves."""
    return [
        EvalContext(
            tuple(found.chunk.text for found in cache.retrieve(text)), (Question(text, ()),)
        )
        for text in read_questions(path)
    ]


def settings_of_store(settings: Settings, cache: RagCache) -> Settings:
    """``settings`` with the model, codec and encoding context that an open store has."""
    recorded = {"model": "model", "codec": "codec", "encoding_context": "compile"}
    missing = {name: key for name, key in recorded.items() if not getattr(settings, name)}
    known = {name: cache.catalog.get_setting(key) for name, key in missing.items()}
    if known.get("codec"):
        known["codec"] = str(known["codec"]).partition(":")[0]  # without its basis
    return settings.model_copy(update={name: value for name, value in known.items() if value})


def calibrate(
    settings: Settings,
    contexts: Sequence[EvalContext],
    modes: Sequence[str] = ("fused",),
    *,
    limit: int = 50,
    max_tokens: int = 32,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ModeSummary]:
    """Summaries of :func:`candidates`, cheapest first. Options and errors are those of
    :func:`ask_candidates`."""
    return summaries(
        ask_candidates(
            settings,
            contexts,
            modes,
            limit=limit,
            max_tokens=max_tokens,
            processes=processes,
            progress=progress,
        )
    )


def ask_candidates(
    settings: Settings,
    contexts: Sequence[EvalContext],
    modes: Sequence[str],
    *,
    limit: int,
    max_tokens: int,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ModeOutcomes]:
    """The outcomes of full prefill, and of :func:`candidates`.

    ``limit`` questions from as many contexts as possible are asked. Their correct answers only say
    how long answers are (:func:`ragcache.eval.dataset.answer_length`). Raises as
    :func:`ragcache.eval.evaluate.ask_all`.
    """
    asked = {"questions": spread_questions(contexts, limit)}
    chosen = {"full": Full(), **candidates(modes)}
    ((_, found),) = ask_all(
        settings, asked, chosen, max_tokens=max_tokens, processes=processes, progress=progress
    )
    return found


def most_chunks(contexts: Sequence[EvalContext], limit: int) -> int:
    """Of a prompt that :func:`ask_candidates` asks."""
    return max((len(one.chunks) for one in spread_questions(contexts, limit)), default=0)


def summaries(outcomes: Sequence[ModeOutcomes]) -> list[ModeSummary]:
    """Summaries of all modes but full prefill, cheapest first."""
    return sorted((one for one in figures(outcomes) if one.mode != "full"), key=_cost)


def cheapest(found: Sequence[ModeSummary], keep: float) -> ModeSummary | None:
    """The cheapest mode that keeps the share ``keep`` of full prefill's answers, or None.

    A ratio qualifies only if all larger ratios of its mode do too, so that a lucky result is not
    chosen. Raises ConfigError unless ``keep`` is in [0, 1].
    """
    check_ratio(keep, "keep")
    qualified: list[ModeSummary] = []
    for _, curve in groupby(sorted(found, key=_method), key=_method):
        falling = sorted(curve, key=_cost, reverse=True)
        qualified += takewhile(lambda f: f.same is not None and f.same.value >= keep, falling)
    return min(qualified, key=_cost, default=None)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mode at a ratio, whose answers are escalated below a least margin. Arrays have a value for
    every question."""

    mode: str  # its label
    least_margin: float  # 0: none is escalated
    failed: NDArray[np.bool_]  # not escalated, and disagreed with full prefill
    escalated: NDArray[np.bool_]
    charged: NDArray[np.float64]  # of an escalated answer, its own share and 1 for full prefill

    @property
    def is_useful(self) -> bool:
        """Whether it costs less than full prefill, or escalates nothing."""
        return not self.least_margin or float(self.charged.mean()) < 1

    def trial(self, questions: NDArray[np.int64] | slice = slice(None)) -> Trial:
        failed = self.failed[questions]
        return Trial(len(failed), int(np.count_nonzero(failed)))


@dataclass(frozen=True, slots=True)
class CandidateTest:
    """A candidate, and whether the promise can be made for it."""

    mode: str  # its label
    trial: Trial
    bound: float  # of the share that fails, at the confidence of the candidate's test
    is_promised: bool  # and it is useful
    #: Questions with which it would be promised, if it and those before it in its sequence failed
    #: on the same shares of them; None if the promise could not be made with any number.
    needed: int | None
    charged: float  # mean
    least_margin: float  # 0: no answer is escalated
    escalated: float  # share of the questions

    @property
    def options(self) -> tuple[str, float | None]:
        """Its mode as :func:`ragcache.blend.blender` reads it, and its ratio."""
        mode, _, ratio = self.mode.partition("@")
        return mode, float(ratio) if ratio else blender(mode).ratio


def one_per_context(contexts: Sequence[EvalContext]) -> list[EvalContext]:
    """The first question over each list of chunks, since questions over the same chunks are not
    independent; and without its correct answers, so that whole answers are compared."""
    first: dict[tuple[str, ...], Question] = {}
    for context in contexts:
        for question in context.questions[:1]:
            first.setdefault(context.chunks, question)
    return [EvalContext(chunks, (replace(one, answers=()),)) for chunks, one in first.items()]


def chains(
    outcomes: Sequence[ModeOutcomes], disagreement: Disagreement, *, escalate: bool = False
) -> list[list[list[Candidate]]]:
    """Sequences of candidates in the order in which they are tested, of each method of ``outcomes``
    but full prefill a chain. Without ``escalate`` a chain is one sequence, of the ratios from the
    largest down; with it, each ratio is a sequence, of :data:`MARGINS`. Raises ConfigError for
    outcomes without what this needs."""
    methods: dict[str, list[ModeOutcomes]] = {}
    for one in outcomes:
        if one.mode != "full":
            methods.setdefault(_method(one), []).append(one)
    curves = [sorted(curve, key=_ratio, reverse=True) for curve in methods.values()]
    if not escalate:
        return [[[_candidate(one, disagreement) for one in curve]] for curve in curves]
    return [
        [[_candidate(one, disagreement, least) for least in MARGINS] for one in curve]
        for curve in curves
    ]


def sequence_share(chained: Sequence[Sequence[object]]) -> float:
    """The share of all that may go wrong which each sequence of these chains has."""
    return 1 / max(1, sum(map(len, chained)))


def candidate_tests(
    outcomes: Sequence[ModeOutcomes],
    promise: Promise,
    disagreement: Disagreement = "answer",
    *,
    escalate: bool = False,
) -> list[CandidateTest]:
    """Every mode of :func:`candidates` with its test, cheapest first. With ``escalate``, at the
    lowest least margin that is promised; if none is, at the highest that costs less than full
    prefill.

    The questions must be independent, and like those that the promise is about: drawn in the same
    way, such as at random from a log.
    """
    every = chains(outcomes, disagreement, escalate=escalate)
    share = sequence_share(every)
    tested: list[CandidateTest] = []
    for chain in every:
        passed = promise.kept([[one.trial() for one in sequence] for sequence in chain], share)
        for sequence, (level, count) in zip(chain, passed, strict=True):
            tested += _test_sequence(sequence, promise, level, count)
    return sorted(tested, key=lambda one: (one.charged, one.trial.failures))


def cheapest_promised(tested: Sequence[CandidateTest]) -> CandidateTest | None:
    """The cheapest candidate that is promised; None if that is full prefill alone."""
    return next((one for one in tested if one.is_promised), None)


def calibration_of(
    chosen: CandidateTest,
    promise: Promise,
    disagreement: Disagreement,
    max_tokens: int,
    fingerprint: Fingerprint,
    encoding: EncodingContext,
    most_chunks: int,
) -> Calibration:
    """What is recorded in a store whose promised candidate is ``chosen``. ``most_chunks``: of a
    prompt that was asked."""
    mode, ratio = chosen.options
    return Calibration(
        epsilon=promise.epsilon,
        confidence=promise.confidence,
        disagreement=disagreement,
        max_tokens=max_tokens,
        mode=mode,
        ratio=ratio,
        least_margin=chosen.least_margin,
        questions=chosen.trial.questions,
        failures=chosen.trial.failures,
        model=str(fingerprint),
        fingerprint=fingerprint.digest.hex(),
        codec=fingerprint.codec,
        encoding_context=encoding.mode,
        context_digest=encoding.digest,
        revision=blender(mode).revision,
        most_chunks=most_chunks,
        date=date.today().isoformat(),
    )


def _test_sequence(
    sequence: Sequence[Candidate], promise: Promise, level: float, count: int
) -> Iterator[CandidateTest]:
    """One test for each mode of a sequence, of whose candidates the first ``count`` passed."""
    needed = [promise.needed(one.trial(), level) for one in sequence]
    for _, group in groupby(range(len(sequence)), key=lambda place: sequence[place].mode):
        places = list(group)
        useful = [place for place in places if sequence[place].is_useful]
        promised = [place for place in useful if place < count]
        place = promised[-1] if promised else (useful or places)[0]
        one, before = sequence[place], needed[: place + 1]
        trial = one.trial()
        yield CandidateTest(
            one.mode,
            trial,
            upper_bound(trial.failures, trial.questions, promise.delta(level)),
            bool(promised),
            None if None in before else max(n or 0 for n in before),
            float(one.charged.mean()),
            one.least_margin,
            float(one.escalated.mean()),
        )


def _candidate(
    one: ModeOutcomes, disagreement: Disagreement, least_margin: float = 0.0
) -> Candidate:
    """A mode with answers escalated below ``least_margin``. Raises ConfigError for outcomes in
    which answers were not compared with full prefill's, or whose margins are not known."""
    compared = "same" if disagreement == "answer" else "same_start"
    agreed = [getattr(outcome, compared) for outcome in one.outcomes]
    if None in agreed:
        raise ConfigError(
            f"the outcomes of {one.mode} lack the comparison with full prefill by {disagreement}: "
            "ask the questions again, in mode full too"
        )
    escalated = np.array([_escalated(one, outcome, least_margin) for outcome in one.outcomes])
    charged = np.array([outcome.charged for outcome in one.outcomes])
    failed = ~np.array(agreed, np.bool_) & ~escalated
    return Candidate(one.mode, least_margin, failed, escalated, charged + escalated)


def _escalated(one: ModeOutcomes, outcome: QuestionOutcome, least_margin: float) -> bool:
    if least_margin and outcome.margin is None:
        raise ConfigError(
            f"the outcomes of {one.mode} lack the margins of first tokens, which decide what is "
            "escalated: ask the questions again"
        )
    return is_uncertain(outcome.margin or 0.0, least_margin)


def _ratio(one: ModeOutcomes) -> float:
    """The ratio in the mode's label."""
    return float(one.mode.partition("@")[2] or 0)


def _method(figures: ModeSummary | ModeOutcomes) -> str:
    """The mode's label without the ratio."""
    return figures.mode.partition("@")[0]


def _cost(figures: ModeSummary) -> tuple[float, float]:
    """The charged share; ties are broken by the KL divergence from full prefill."""
    return figures.charged, figures.kl or 0.0
