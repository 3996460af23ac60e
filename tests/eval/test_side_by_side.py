"""Questions answered in several modes over the same prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragcache.blend.full import Full
from ragcache.blend.prefix import Prefix
from ragcache.blend.reuse import Reuse
from ragcache.eval.dataset import Question
from ragcache.eval.side_by_side import Comparison, ask_side_by_side, mode_figures
from ragcache.types import Answer, Prompt, Report, Sampling
from tests import scene


def test_all_modes_answer_over_the_same_prompt(tmp_path: Path) -> None:
    questions = [Question("Who keeps a parrot?", ("x",)), Question("Where are boats?", ("x",))]
    modes = {"full": Full(), "prefix": Prefix(), "reuse": Reuse()}
    done = []
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        asked = ask_side_by_side(
            cache,
            questions,
            modes,
            sampling=Sampling(max_tokens=4),
            top_k=2,
            progress=lambda *count: done.append(count),
        )
        compared = list(asked)
    assert done == [(number, 6) for number in range(1, 7)]
    for one in compared:
        assert list(one.answers) == list(modes)
        assert len({answer.prompt for answer in one.answers.values()}) == 1
        assert one.answers["prefix"].tokens == one.answers["full"].tokens
    full, prefix, reuse = mode_figures(compared)
    assert (full.times_sooner, full.charged, full.bytes_loaded) == (1.0, 1.0, 0.0)
    assert reuse.charged == 0.0 and reuse.leading_chunks == reuse.chunks
    assert full.same == prefix.same == 2 and prefix.lost is None


def answered(text: str, right: tuple[str, ...], full: str = "", mode: str = "fused") -> Comparison:
    """A comparison of an answer in a mode with one of full prefill."""

    def answer(said: str) -> Answer:
        report = Report("fused", {}, 0, 0, 0, 0, 0, 1.0, 0, 1.0, 1.0)
        return Answer(said, (), "eos", (), Prompt.of((), (), ()), report)

    both = {mode: answer(text), "full": answer(full)}
    return Comparison(Question("Who?", right), both)


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("She sank on 10 August 1628.", ("10 August 1628",), True),
        ("It is 1642 metres deep", ("1,642",), True),
        ("It is 1,642 metres deep", ("1642",), True),
        ("the SEA ROCKET", ("moss", "sea rocket"), True),
        ("She sank on 10 August 16280.", ("10 August 1628",), False),
        ("Vasari", ("Vasa",), False),
        ("", ("Vasa",), False),
    ],
)
def test_a_right_answer_contains_an_expected_one(
    text: str, answers: tuple[str, ...], right: bool
) -> None:
    assert answered(text, answers).is_right("fused") is right


def test_answers_are_the_same_if_both_are_right_or_equal() -> None:
    assert answered("In Oslo.", ("Oslo",), "It is in Oslo").is_same("fused")
    assert answered("The Bexley mill", ("Oslo",), "bexley mill.").is_same("fused")
    assert not answered("In Bexley", ("Oslo",), "In Oslo").is_same("fused")
    assert not answered("In Oslo", ("Oslo",), "In Bexley").is_same("fused")
