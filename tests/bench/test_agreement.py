"""The tables of agreement with full prefill, and files of outcomes."""

from __future__ import annotations

from collections.abc import Collection

from bench.agreement import Outcome, joined, shown


def pairs(labels: Collection[str]) -> list[tuple[str, str]]:
    return [("reuse, bos", "reuse, exact")] if "reuse, bos" in labels else []


def outcome(kl: float, *labels: str) -> Outcome:
    return {label: {"kl": kl, "first": 2 * kl, "top1": 0.5, "same": 1.0} for label in labels}


def test_the_tables_have_means_and_paired_differences() -> None:
    every = [
        {**outcome(kl + 0.25, "reuse, bos"), **outcome(kl, "reuse, exact")} for kl in (0.5, 1.5)
    ]
    means, differences = shown(every, pairs).split("\n\n")
    assert "| reuse, bos | 1.250 | 2.500 | 50% | 100% |" in means
    assert "| reuse, exact | 1.000 | 2.000 | 50% | 100% |" in means
    rows = differences.splitlines()[2:]
    same = "+0% [+0%, +0%]"
    want = "+0.250 [+0.250, +0.250] | +0.500 [+0.500, +0.500]"
    assert rows == [f"| reuse, bos | reuse, exact | {want} | {same} | {same} |"]


def test_one_question_has_no_intervals() -> None:
    every = [outcome(0.5, "reuse, bos", "reuse, exact")]
    assert shown(every, pairs).splitlines()[-1].endswith("| +0.000 | +0.000 | +0% | +0% |")


def test_a_variant_that_a_question_lacks_is_left_out() -> None:
    text = shown([outcome(0.5, "reuse, bos", "reuse, exact"), outcome(0.5, "reuse, exact")], pairs)
    assert "reuse, exact" in text and "reuse, bos" not in text


def test_files_are_joined_by_question_and_the_first_counts() -> None:
    one = [outcome(1, "a", "b"), outcome(2, "a", "b")]
    two = [outcome(3, "b", "c"), outcome(4, "b", "c"), outcome(5, "b", "c")]
    got = [{label: of["kl"] for label, of in each.items()} for each in joined([one, two])]
    assert got == [{"a": 1, "b": 1, "c": 3}, {"a": 2, "b": 2, "c": 4}]
