"""Scores by kind and mode, and the two dataset formats."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from ragcache.errors import ConfigError, SourceError
from ragcache.eval.dataset import (
    EvalContext,
    Question,
    answer_length,
    first_questions,
    load_dataset,
    load_datasets,
)
from ragcache.eval.evaluate import MODES, compare, evaluate, make_blenders
from ragcache.eval.parallel import run_parallel
from ragcache.eval.summary import figures
from ragcache.settings import Settings
from ragcache.store.memory import MemoryStore
from tests import models
from tests.eval import asking

CONTEXT = EvalContext(
    ("Mira Holt plays the cello.", "She was born in Oslo."),
    (Question("Where?", ("Oslo",), "split"), Question("What?", ("cello",), "direct")),
)

OTHER = EvalContext(("The mill stands in Bexley.", "It grinds no more."), CONTEXT.questions)


def test_every_mode_is_scored_on_every_question() -> None:
    engine, store = models.engine("llama"), MemoryStore()
    chosen = make_blenders(["full", "reuse", "cacheblend", "prophet"])
    contexts = [CONTEXT, OTHER]
    found = {f.mode: f for f in figures(evaluate(engine, store, contexts, chosen, max_tokens=3))}
    assert list(found) == list(chosen)
    assert all(f.questions == {"split": 2, "direct": 2} for f in found.values())
    full, reuse, blend, prophet = found.values()
    assert (full.charged, reuse.charged) == (1, 0)
    assert 0.5 < blend.charged < 1  # two of four layers in full
    assert 0.2 < prophet.charged  # the probe counts
    assert full.bytes_loaded == 0 < blend.bytes_loaded == 3 / 4 * reuse.bytes_loaded
    assert (full.speedup, full.kl, full.agreement) == (1, 0, 1)
    assert reuse.kl is not None and reuse.kl > 0
    assert store.stats().chunks == 0  # nothing is left behind


def test_chunks_are_computed_as_asked() -> None:
    """After a BOS token of its own, a chunk has other KV, and reuse gives other logits."""
    engine = models.engine("llama")
    asked = [CONTEXT], make_blenders(["full", "reuse"])
    both = [
        figures(evaluate(engine, MemoryStore(), *asked, compile_mode=mode, max_tokens=2))
        for mode in ("prefix", "bos")
    ]
    assert both[0][0].kl == both[1][0].kl == 0
    assert both[0][1].kl != both[1][1].kl


def test_variants_are_made_for_modes_that_load_them() -> None:
    engine, store = models.engine("llama"), MemoryStore()
    three = EvalContext((*CONTEXT.chunks, "The boats were small."), CONTEXT.questions)
    chosen = make_blenders(["full", "reuse", "cachecraft:alpha=0.4"])
    plain = figures(evaluate(engine, store, [three], chosen, max_tokens=1))
    assert 0 < plain[2].charged < 0.4 and plain[2].bytes_loaded == plain[1].bytes_loaded
    assert store.stats().chunks == 0


def test_contexts_over_the_same_chunks_are_one() -> None:
    """CacheBlend's format has an entry per question: intervals must not take them as apart."""
    engine, chosen = models.engine("llama"), make_blenders(["full", "reuse"])
    apart = [EvalContext(CONTEXT.chunks, (question,)) for question in CONTEXT.questions]
    found = figures(evaluate(engine, MemoryStore(), [*apart, OTHER], chosen, max_tokens=2))
    assert found[0].contexts == 2


def test_processes_share_the_questions() -> None:
    """In their order, and contexts over the same chunks stay one. That figures are those of one
    process is tested with a run that goes on where it was killed."""
    apart = [EvalContext(CONTEXT.chunks, (question,)) for question in CONTEXT.questions]
    contexts, told = [apart[0], OTHER, apart[1]], list[tuple[int, int]]()
    found = run_parallel(asking.texts, contexts, 3, lambda *steps: told.append(steps))
    assert [one.model for one in found] == ["Where?", "Where?", "What?", "What?"]
    assert [one.outcomes["full"].context for one in found] == [0, 1, 1, 0]
    assert told == [(done, 4) for done in range(5)]
    with pytest.raises(ConfigError, match="processes is 0: it takes at least 1"):
        compare(Settings.load(), {"asked": contexts}, make_blenders(["full"]), processes=0)


def test_what_was_stopped_leaves_no_process_behind() -> None:
    def stop(done: int, total: int) -> None:
        if multiprocessing.active_children():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parallel(asking.texts, [CONTEXT, OTHER], 2, stop)
    assert not multiprocessing.active_children()


def test_comparing_with_a_mode_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot compare with 'random': the modes are full"):
        compare(Settings.load(), {"asked": [CONTEXT]}, make_blenders(["full"]), against="random")


def test_cacheblends_format_nested_or_not(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    ctxs = [{"title": "Mira", "text": "She plays."}, {"title": "", "text": "No title."}]
    entries = [
        {"ctxs": ctxs, "question": "Who?", "answers": ["Mira", "Holt"]},
        {"ctxs": ctxs, "question": "Who?", "answers": [["Mira", "Holt"]]},
    ]
    path.write_text(json.dumps(entries))
    first, second = load_dataset(path)
    assert first == second
    assert first.chunks == ("Mira\n\nShe plays.", "No title.")
    assert first.questions[0].answers == ("Mira", "Holt")


def test_the_shipped_prompts_load(tiny_model_dir: Path) -> None:
    contexts = load_dataset(tiny_model_dir / "world" / "prompts.jsonl")
    kinds = {q.kind for c in contexts for q in c.questions}
    assert {"direct", "local", "split"} <= kinds


def test_take_cuts_inside_a_context() -> None:
    taken = first_questions([CONTEXT] * 3, 3)
    assert [len(c.questions) for c in taken] == [2, 1]
    with pytest.raises(ConfigError, match="at least 1"):
        first_questions([CONTEXT], 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"chunks": ["x"]}', "a.jsonl:1: expected chunks and questions"),
        ("a.json", '[{"question": "x"}]', r"a.json\[0\]: expected ctxs"),
        ("a.json", "[", "is not valid JSON"),
        ("a.json", "[]", "has no questions"),
    ],
)
def test_broken_datasets_name_the_entry(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        load_dataset(tmp_path / name)
    with pytest.raises(SourceError, match="cannot read the questions"):
        load_dataset(tmp_path / "missing.json")


def test_long_answers_are_told_by_the_median() -> None:
    summary = " ".join(["word"] * 9)
    assert answer_length([CONTEXT]) == "short"
    long = EvalContext(("a",), (Question("?", (summary, summary, "short")),))
    assert answer_length([long]) == "long"
    assert answer_length([EvalContext(("a",), (Question("?", ()),))]) == "unknown"


def test_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    line = json.dumps({"chunks": ["x"], "questions": [{"question": "?", "answers": ["x"]}]})
    paths = [tmp_path / "a.jsonl", tmp_path / "one" / "b.jsonl", tmp_path / "two" / "b.jsonl"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(line + "\n")
    assert list(load_datasets(paths)) == ["a.jsonl", str(paths[1]), str(paths[2])]


def test_a_ratio_goes_to_the_modes_that_take_one() -> None:
    made = make_blenders(ratios=[0.3])
    assert list(made) == list(MODES)
    assert made["cacheblend"].parameters["recompute_ratio"] == 0.3
    several = make_blenders(["full", "cacheblend", "random:recompute_ratio=0.5"], [0.1, 0.2])
    assert list(several) == [
        "full",
        "cacheblend@0.1",
        "cacheblend@0.2",
        "random:recompute_ratio=0.5",
    ]
    with pytest.raises(ConfigError, match="none of the modes full, reuse takes a ratio"):
        make_blenders(["full", "reuse"], [0.3])
    with pytest.raises(ConfigError, match="ratio is 1.5: it is the share"):
        make_blenders(ratios=[1.5])
    with pytest.raises(ConfigError, match="mode 'blend' is unknown"):
        make_blenders(["blend"])
