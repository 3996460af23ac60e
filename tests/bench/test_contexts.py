"""Encoding contexts compared: the rows per chunk, and a run of the small model."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from bench import contexts
from bench.agreement import load, opened
from bench.contexts import ask, rows_per_chunk, variants
from ragcache.blend.base import Layout
from ragcache.planning.context import EncodingContext
from ragcache.testing import models
from ragcache.types import Prompt

SIZES = 9, 30, 1, 17, 23


def layout(sizes: tuple[int, ...] = SIZES) -> Layout:
    """Chunks whose tokens have different sensitivities."""
    chunks = tuple(tuple(range(10, 10 + size)) for size in sizes)
    prompt = Prompt.of((1, 2, 3), chunks, (4, 5))
    known = tuple(tuple(float(t * 37 % 101 + n) for t in c) for n, c in enumerate(chunks, 1))
    loaded = (True,) * len(chunks)
    return Layout(prompt, loaded, 1, tuple(range(len(prompt))), sensitivities=known)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.15, 0.5, 1.0])
def test_rows_per_chunk_are_the_most_sensitive_of_each_and_as_many_in_all(ratio: float) -> None:
    made = layout()
    rows = rows_per_chunk(made, ratio)
    assert len(rows) == int(ratio * sum(SIZES))
    assert rows.tolist() == sorted(set(rows.tolist()))
    scores = dict(zip(made.reusable.tolist(), made.sensitivity.tolist(), strict=True))
    for start, stop in made.prompt.spans:
        chosen = [scores[row] for row in rows.tolist() if start <= row < stop]
        others = [scores[row] for row in range(start, stop) if row not in rows]
        assert abs(len(chosen) - ratio * (stop - start)) <= 1
        assert not chosen or not others or min(chosen) >= max(others)


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.5])
def test_rows_of_a_chunk_do_not_depend_on_later_chunks(ratio: float) -> None:
    every = rows_per_chunk(layout(), ratio)
    for count, stop in enumerate(accumulate(SIZES), 1):
        fewer = rows_per_chunk(layout(SIZES[:count]), ratio)
        assert torch.equal(fewer, every[every < 3 + stop])


def test_a_chunk_that_is_not_loaded_has_no_rows() -> None:
    made = layout()
    without = Layout(
        made.prompt, (True, False, True, True, True), 1, made.positions, (), (), made.sensitivities
    )
    start, stop = made.prompt.spans[1]
    rows = rows_per_chunk(without, 0.5)
    assert len(rows) == 25 and not any(start <= row < stop for row in rows.tolist())


def test_every_variant_is_compared() -> None:
    pairs = contexts._pairs(list(variants()))
    assert {label for pair in pairs for label in pair} == set(variants())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["bench.contexts", *map(str, arguments)])
    contexts.main()


@pytest.fixture
def asked(tmp_path: Path) -> list[object]:
    """Arguments for a run of the small model over two questions."""
    lines = [
        {
            "chunks": [f"Street {n}\n\nIt has {n} houses. They are old.", "A town.", "A river."],
            "questions": [{"question": f"How many houses has street {n}?", "answers": [str(n)]}],
        }
        for n in range(2)
    ]
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--model", "tiny", "--set", data, "--out", tmp_path / "out" / "all.jsonl"]


def test_a_run_goes_on_after_a_torn_line(
    tmp_path: Path,
    asked: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "all.jsonl"
    monkeypatch.setattr(contexts, "TEXTS", contexts.TEXTS[-1:])
    run(monkeypatch, *asked, "--only", "reuse, ", "--questions", 1)
    first = out.read_bytes()
    out.write_bytes(first + b'{"reuse, bos": {"kl"')
    assert len(load(out)) == 1
    capsys.readouterr()
    run(monkeypatch, *asked, "--only", "reuse")
    printed = capsys.readouterr().out
    assert "2 of 2 questions" in printed and "1 of 2 questions" not in printed
    assert out.read_bytes().startswith(first) and len(load(out)) == 2
    assert load(out)[0].keys() == {
        f"reuse, {name}" for name in (*contexts.CONTEXTS, *contexts.TEXTS)
    }

    page = tmp_path / "docs" / "contexts.md"
    run(monkeypatch, "--out", out, "--table", page)
    text = page.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "reuse, prefix | reuse, exact" in text and "2 questions" in text
    assert "torch" in text and "commit" in text


def test_wrong_arguments_and_files(
    tmp_path: Path,
    asked: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "all.jsonl"
    for arguments, why in (
        (["--out", out], "give --model, --set and one --out"),
        (["--out", out, "--table", tmp_path / "page.md"], "no question is saved in"),
        ([*asked, "--only", "prophet"], "no variant has 'prophet' in its label"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert why in capsys.readouterr().err
    with opened(out), pytest.raises(SystemExit):
        run(monkeypatch, *asked)
    assert "another process saves outcomes in" in capsys.readouterr().err


def test_the_first_chunk_is_exact_behind_the_exact_prefix_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = models.engine("llama")
    one = Prompt.of((1, 5, 9), [tuple(range(10, 40))], (100, 101, 102))
    monkeypatch.setattr(
        contexts,
        "encoding_context",
        lambda name, engine: EncodingContext(name, (1,) if name == "bos" else (1, 7, 8, 9)),
    )
    labels = {label for label, (name, _) in variants().items() if name in contexts.CONTEXTS}
    found = ask(engine, one, labels)
    assert found.keys() == labels
    for label, of in found.items():
        exact = label.endswith("exact")
        assert (of["kl"] < 1e-6) == exact, (label, of)
        assert not exact or (of["top1"], of["same"]) == (1.0, 1.0)
