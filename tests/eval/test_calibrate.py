"""The lowest cost that keeps full prefill's answers, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ragcache.blend import blender
from ragcache.blend.ape import APE
from ragcache.cli.render.quality import promise_advice, ratio_advice
from ragcache.errors import ConfigError, SourceError
from ragcache.eval.bootstrap import Estimate
from ragcache.eval.calibrate import (
    RATIOS,
    _ape_grid,
    calibrate,
    calibration_of,
    candidate_tests,
    candidates,
    cheapest,
    cheapest_promised,
    one_per_context,
    retrieve_contexts,
    settings_of_store,
)
from ragcache.eval.dataset import EvalContext, Question, read_questions, spread_questions
from ragcache.eval.outcomes import ModeOutcomes, QuestionOutcome
from ragcache.eval.promise import Promise, upper_bound
from ragcache.eval.summary import ModeSummary
from ragcache.planning.context import EncodingContext
from ragcache.settings import Settings
from ragcache.types import Fingerprint
from tests import scene

CONTEXTS = [
    EvalContext((f"Mira {n} plays the cello.", "She was born in Oslo."), (Question("Who?", ()),))
    for n in range(3)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[ModeSummary]:
    model = scene.save_model(tmp_path_factory.mktemp("model") / "llama")
    modes = ["reuse", "random", "cacheblend:recompute_ratio=1"]
    return calibrate(Settings.load(model=str(model)), CONTEXTS, modes, max_tokens=4)


def figure(found: list[ModeSummary], mode: str, same: float, charged: float) -> ModeSummary:
    return replace(found[0], mode=mode, same=Estimate(same, None), charged=charged, kl=1 - same)


def test_the_curve_goes_from_reuse_to_full_prefill(found: list[ModeSummary]) -> None:
    charged = [one.charged for one in found]
    assert charged == sorted(charged) and (charged[0], charged[-1]) == (0, 1)
    assert {one.mode for one in found} == {
        "reuse",
        "cacheblend:recompute_ratio=1",
        *(f"random@{ratio:g}" for ratio in RATIOS),
    }
    all_of_it = found[-1]
    assert all_of_it.same is not None and all_of_it.same.value == 1
    assert all_of_it.kl == pytest.approx(0, abs=1e-6) and (found[0].kl or 0) > 1e-3


def test_the_least_that_keeps_enough(found: list[ModeSummary]) -> None:
    curve = [
        figure(found, "fused@0.05", 0.90, 0.05),
        figure(found, "fused@0.1", 0.97, 0.10),
        figure(found, "fused@0.2", 0.99, 0.20),
    ]
    dear = figure(found, "cacheblend@0.1", 1.0, 0.28)
    chosen = cheapest([*curve, dear], 0.95)
    assert chosen is not None and chosen.mode == "fused@0.1"
    assert cheapest([*curve, dear], 1.0) == dear
    assert cheapest(curve, 1.0) is None
    with pytest.raises(ConfigError, match="keep is 95"):
        cheapest(curve, 95)


def test_a_ratio_that_keeps_answers_by_luck_is_not_chosen(found: list[ModeSummary]) -> None:
    lucky = [
        figure(found, "fused@0.05", 0.96, 0.05),
        figure(found, "fused@0.1", 0.90, 0.10),
        figure(found, "fused@0.2", 0.99, 0.20),
    ]
    chosen = cheapest(lucky, 0.95)
    assert chosen is not None and chosen.mode == "fused@0.2"


def test_where_the_work_is_the_same_the_nearest_is_chosen(found: list[ModeSummary]) -> None:
    apes = [figure(found, f"ape:scale={s}", same, 0.0) for s, same in ((0.8, 0.96), (0.9, 0.98))]
    assert cheapest(apes, 0.95) == apes[1]


def test_what_to_set_is_said(found: list[ModeSummary]) -> None:
    kept = replace(figure(found, "fused@0.1", 0.97, 0.1), same=Estimate(0.97, (0.91, 1.0)))
    said = ratio_advice(kept, 0.95)
    assert "--mode fused --ratio 0.1 (97% of full" in said and "interval begins at 91%" in said
    assert "Use mode full" in ratio_advice(None, 0.95)


def test_full_prefill_is_no_candidate() -> None:
    with pytest.raises(ConfigError, match="mode full is what others are compared with"):
        candidates(["fused", "full"])


def test_candidates_are_tried_at_ratios_or_as_they_are() -> None:
    made = candidates(["fused", "epic", "random:recompute_ratio=0.2", "ape"])
    assert len(made) == len(RATIOS) + 1 + 1 + 25
    assert made["fused@0.05"] == blender("fused", 0.05) and made["epic"] == blender("epic")
    with pytest.raises(ConfigError, match="mode 'fuzed' is unknown"):
        candidates(["fuzed"])


def test_questions_are_asked_over_what_the_store_finds(tmp_path: Path) -> None:
    asked = tmp_path / "questions.txt"
    asked.write_text("Who plays the cello?\n\n  Where is the mill?  \n")
    with scene.small(tmp_path / "store") as cache:
        cache.add(scene.DOCUMENTS)
        contexts = retrieve_contexts(asked, cache)
        assert [c.questions[0].text for c in contexts] == read_questions(asked)
        found = [
            tuple(p.chunk.text for p in cache.retrieve(text)) for text in read_questions(asked)
        ]
        assert [c.chunks for c in contexts] == found and all(found)
        cache.catalog.put_setting("model", "a-model")
        assert settings_of_store(Settings.load(), cache).model == "a-model"
        assert settings_of_store(Settings.load(model="another"), cache).model == "another"
    asked.write_text("\n")
    with pytest.raises(SourceError, match="write one per line"):
        read_questions(asked)


def test_the_grid_is_the_authors() -> None:
    grid = _ape_grid()
    assert len(grid) == 25 and set(grid.values()) >= {APE(0.6, 1.0), APE(1.0, 1.0)}
    assert all(blender(mode) == made for mode, made in grid.items())


def test_questions_come_from_many_contexts() -> None:
    many = [EvalContext(c.chunks, c.questions * 5) for c in CONTEXTS]
    assert [len(c.questions) for c in spread_questions(many, 4)] == [2, 2]
    assert [len(c.questions) for c in spread_questions(many, 2)] == [1, 1]
    with pytest.raises(ConfigError, match="at least 1"):
        spread_questions(many, 0)


def outcomes(mode: str, agreed: Sequence[bool | None], charged: float = 0.0) -> ModeOutcomes:
    """Of questions whose answers agreed with full prefill's, or not; first tokens always did."""
    each = [
        QuestionOutcome(0, "", True, 1, None, 0, True, 0, 1, same, 1, 1, 0, charged, 0, True)
        for same in agreed
    ]
    return ModeOutcomes(mode, "", {}, each)


def test_the_cheapest_that_passes_is_promised() -> None:
    """The ratios of a mode from the largest down, to the first that fails; δ shared by modes."""
    failing = [True] * 90 + [False] * 10
    curve = [
        outcomes("fused@0", [True] * 100, 0.0),  # by luck: a larger ratio fails
        outcomes("fused@0.05", failing, 0.05),
        outcomes("fused@0.15", [True] * 100, 0.15),
        outcomes("fused@0.5", [True] * 99 + [False], 0.5),
    ]
    tests = candidate_tests([outcomes("full", [True] * 100, 1.0), *curve], Promise(0.05))
    assert [one.mode for one in tests] == [one.mode for one in curve]  # cheapest first
    assert [one.is_promised for one in tests] == [False, False, True, True]
    assert [one.needed for one in tests] == [None, None, 100, 100]
    chosen = cheapest_promised(tests)
    assert chosen is not None and chosen.options == ("fused", 0.15)
    assert chosen.bound == pytest.approx(1 - 0.05**0.01)
    dear = outcomes("epic", [True] * 100, 0.3)
    shared = candidate_tests([*curve, dear], Promise(0.05))
    assert [one.mode for one in shared if one.is_promised] == ["epic"]  # 1 of 100: 0.037 > 0.025
    assert cheapest_promised(candidate_tests(curve[1:2], Promise(0.05))) is None
    tokens = candidate_tests(curve[1:2], Promise(0.05), "tokens")
    assert tokens[0].is_promised


def uncertain(mode: str, charged: float, *, disagree: int, sure: int, n: int = 200) -> ModeOutcomes:
    """Of ``n`` answers, ``disagree`` have margins of 1.9 and disagree, as many have them and agree,
    and ``sure`` disagree with margins of 9."""
    found = outcomes(mode, [False] * (disagree + sure) + [True] * (n - disagree - sure), charged)
    margins = [1.9] * disagree + [9.0] * (n - 2 * disagree) + [1.9] * disagree
    each = [
        replace(one, margin=margin) for one, margin in zip(found.outcomes, margins, strict=True)
    ]
    return replace(found, outcomes=each)


def test_with_escalation_more_can_be_promised() -> None:
    """Each ratio at the lowest margin that passes; a quarter of δ for each, and what larger ratios
    hand on."""
    curve = [
        uncertain("fused@0.5", 0.5, disagree=0, sure=2),  # needs none: P(X <= 2) = 0.002
        uncertain("fused@0.3", 0.3, disagree=2, sure=2),  # P(X <= 4) = 0.026, above half of δ
        uncertain("fused@0.05", 0.05, disagree=30, sure=1),
        uncertain("fused@0", 0.0, disagree=60, sure=12),  # sure of too much
    ]
    promise = Promise(0.05)
    tests = candidate_tests(curve, promise, escalate=True)
    assert [one.mode for one in tests] == ["fused@0.3", "fused@0.05", "fused@0.5", "fused@0"]
    assert [one.is_promised for one in tests] == [True, True, True, False]
    assert [one.least_margin for one in tests] == [2.0, 2.0, 0.0, 8.0]  # 16 would escalate all
    assert [one.escalated for one in tests] == [0.02, 0.3, 0.0, 0.6]
    assert [one.charged for one in tests] == pytest.approx([0.32, 0.35, 0.5, 0.6])
    assert [one.trial.failures for one in tests] == [2, 1, 2, 12]
    assert tests[1].bound == pytest.approx(upper_bound(1, 200, 0.0125))
    chosen = cheapest_promised(tests)
    assert chosen is tests[0]
    own = Fingerprint((("weights", "w"),))
    encoding = EncodingContext("prose", (1, 2))
    made = calibration_of(chosen, promise, "answer", 6, own, encoding, 5)
    assert (made.mode, made.ratio, made.least_margin) == ("fused", 0.3, 2.0)
    assert (made.most_chunks, made.revision) == (5, blender("fused").revision)
    assert not made.expired(own, encoding)
    assert made.expired(own, EncodingContext("prose", (1, 3))).endswith("calibrate again")
    assert not any(one.is_promised for one in candidate_tests(curve[2:3], promise))
    [line] = promise_advice(tests[1:], promise)
    assert line.startswith(
        "Promised: --mode fused --ratio 0.05, full prefill where the first token's margin is below "
        "2 (at most 5.0% of answers"
    )
    assert line.endswith("; 30% escalated, 35% computed).")


def test_what_costs_more_than_full_prefill_is_not_promised() -> None:
    dear = [uncertain("fused@0.5", 0.5, disagree=60, sure=0)]  # 60 % escalated: 1.1
    [test] = candidate_tests(dear, Promise(0.05), escalate=True)
    assert not test.is_promised and test.charged <= 1 and test.needed is None
    unknown = [outcomes("fused@0.05", [True])]
    with pytest.raises(ConfigError, match="lack the margins of first tokens"):
        candidate_tests(unknown, Promise(0.05), escalate=True)


def test_questions_needed_are_said() -> None:
    few = [outcomes("fused@0.05", [True] * 40, 0.05), outcomes("fused@0.5", [True] * 40, 0.5)]
    tests = candidate_tests(few, Promise(0.05))
    said = " ".join(promise_advice(tests, Promise(0.05)))
    assert said.startswith("Nothing cheaper than full prefill can be promised: at most 5.0% of")
    assert said.endswith(
        "With 19 more questions of which as few disagree, fused@0.05 can be promised."
    )
    passed = candidate_tests([outcomes("fused@0.05", [True] * 59, 0.05)], Promise(0.05))
    [line] = promise_advice(passed, Promise(0.05))
    assert line.startswith("Promised: --mode fused --ratio 0.05 (at most 5.0% of answers")


def test_outcomes_without_full_prefill_promise_nothing() -> None:
    with pytest.raises(ConfigError, match="lack the comparison with full prefill by answer"):
        candidate_tests([outcomes("fused@0.05", [True, None])], Promise(0.05))


def test_one_question_of_each_context_is_asked() -> None:
    again = EvalContext(CONTEXTS[0].chunks, (Question("Where?", ("Oslo",)),))
    many = [EvalContext(c.chunks, c.questions * 2) for c in CONTEXTS]
    assert one_per_context([*many, again]) == CONTEXTS
    assert one_per_context([again, EvalContext(("A.",), ())]) == [
        EvalContext(again.chunks, (Question("Where?", ()),))
    ]
