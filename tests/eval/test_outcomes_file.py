"""Evaluations that are killed and continued, and files of outcomes that cannot be used."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ragcache.errors import ConfigError, SourceError
from ragcache.eval.dataset import EvalContext, Question
from ragcache.eval.evaluate import compare, make_blenders
from ragcache.eval.outcomes import AskedQuestion, ModeOutcomes, QuestionOutcome
from ragcache.eval.outcomes_file import OutcomesFile, load_outcomes, run_header
from ragcache.eval.summary import ModeSummary, figures
from ragcache.settings import Settings
from tests import scene

QUESTIONS = (Question("Where?", ("Oslo",), "split"), Question("What?", ("cello",), "direct"))
CONTEXTS = [
    EvalContext(("Mira Holt plays the cello.", "She was born in Oslo."), QUESTIONS),
    EvalContext(("The mill stands in Bexley.", "It grinds no more."), QUESTIONS),
    EvalContext(("Mira Holt plays the cello.", "She was born in Oslo."), QUESTIONS[:1]),
]
MODES = ["full", "reuse", "random:recompute_ratio=0.5"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load(model=str(scene.save_model(tmp_path / "llama")))


def run(
    settings: Settings,
    save: Path | None = None,
    *,
    stop_after: int | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> dict[str, list[ModeSummary]]:
    """The summaries of two data sets, or KeyboardInterrupt after so many questions."""

    def progress(name: str, done: int, total: int) -> None:
        if (name, done) == ("two", stop_after):
            raise KeyboardInterrupt

    datasets = {"one": CONTEXTS[:1], "two": CONTEXTS}
    given = {"max_tokens": 2, **options}
    modes = make_blenders(given.pop("modes", MODES))
    told = [] if notes is None else notes
    made = compare(
        settings, datasets, modes, save=save, progress=progress, note=told.append, **given
    )
    return {name: [replace(f, ttft_s=0, speedup=None) for f in found] for name, found in made}


def assert_same(some: dict[str, list[ModeSummary]], others: dict[str, list[ModeSummary]]) -> None:
    """The same figures, up to rounding: threads differ between processes."""
    assert some.keys() == others.keys()
    for name, found in some.items():
        for one, other in zip(found, others[name], strict=True):
            assert (one.mode, one.contexts, one.questions) == (
                other.mode,
                other.contexts,
                other.questions,
            )
            mine, theirs = one.as_json(), other.as_json()
            for key in ("f1", "answer_kl", "answer_top1", "first_token_kl", "charged_budget"):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-6)


@pytest.mark.parametrize(
    ("processes", "later"), [(1, 1), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_goes_on_where_it_stopped(
    settings: Settings, tmp_path: Path, processes: int, later: int
) -> None:
    save, notes = tmp_path / "run.jsonl", list[str]()
    whole = run(settings)
    with pytest.raises(KeyboardInterrupt):
        run(settings, save, stop_after=3, processes=processes)
    lines = save.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 1 + 2 + 3  # header, all questions of one, and three of two
    save.write_bytes(b"".join(lines)[:-10])  # killed while it wrote the last line
    assert_same(run(settings, save, processes=later, notes=notes), whole)
    assert notes == [
        f"the last line of {save} was incomplete: it was removed",
        f"{len(lines) - 2} of 7 questions are in {save} already",
    ]
    assert len(save.read_bytes().splitlines()) == 1 + 7
    finished = save.read_bytes()
    assert_same(run(settings, save), whole)  # nothing is left to ask
    assert save.read_bytes() == finished
    loaded = {
        n: [replace(f, ttft_s=0, speedup=None) for f in figures(s)]
        for n, s in load_outcomes(save).items()
    }
    assert_same(loaded, whole)


def test_another_run_is_refused_and_says_what_differs(settings: Settings, tmp_path: Path) -> None:
    save = tmp_path / "run.jsonl"
    run(settings, save)
    with pytest.raises(ConfigError, match=r"another run \(max_tokens: 2, now 3\). Repeat that run"):
        run(settings, save, max_tokens=3)
    with pytest.raises(ConfigError, match="instruction: '', now 'Be brief.'"):
        run(settings, save, instruction="Be brief.")
    with pytest.raises(ConfigError, match="modes: full, reuse, random.*, now full, reuse"):
        run(settings, save, modes=["full", "reuse"])
    with pytest.raises(ConfigError, match=r"datasets: one \(2 questions, .*now one \(5 questions"):
        list(compare(settings, {"one": CONTEXTS}, make_blenders(MODES), max_tokens=2, save=save))


def test_another_model_in_the_same_folder_is_refused(settings: Settings, tmp_path: Path) -> None:
    save = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(settings, save, stop_after=1)
    scene.save_model(Path(settings.model), seed=1)
    with pytest.raises(ConfigError, match="are of another model than llama@"):
        run(settings, save)


def outcome(kl: float, context: int = 0) -> QuestionOutcome:
    return QuestionOutcome(context, "hop", True, 1, None, kl, True, kl, 1, True, 1, 1, 0, 0, 0)


def save_outcomes(
    path: Path, modes: list[str], questions: int = 3, model: str = "a1", **options: Any
) -> Path:
    """A file with outcomes of one data set, whose KL is the number of the question."""
    given = {"max_tokens": 2, "instruction": "", **options}
    header = run_header(Settings.load(), {"one": CONTEXTS}, make_blenders(modes), **given)
    saved = OutcomesFile.open(path, header)
    for number in range(questions):
        outcomes = {mode: outcome(number) for mode in modes}
        saved.append("one", number, AskedQuestion(model, outcomes))
    saved.close()
    return path


def test_outcomes_of_an_earlier_rule_are_not_continued(tmp_path: Path) -> None:
    """Nor are those of an earlier text of the encoding context; and neither is joined with new
    ones."""
    path, new = (save_outcomes(tmp_path / name, ["full", "fused"]) for name in ("a", "b"))
    header, *rest = path.read_text().splitlines(keepends=True)
    entry = json.loads(header)
    made = make_blenders(["full", "fused"])
    given: dict[str, Any] = {"max_tokens": 2, "instruction": ""}
    now = run_header(Settings.load(), {"one": CONTEXTS}, made, **given)
    assert entry["modes"]["fused"].pop("revision") == 2 and "revision" not in entry["modes"]["full"]
    path.write_text(json.dumps(entry) + "\n" + "".join(rest))
    with pytest.raises(ConfigError, match=r"modes: full, fused, now full, fused, revision 2\)"):
        OutcomesFile.open(path, now)
    entry = json.loads(header)
    assert entry.pop("encoding_revision") == 2
    path.write_text(json.dumps(entry) + "\n" + "".join(rest))
    with pytest.raises(ConfigError, match="encoding_revision: None, now 2"):
        OutcomesFile.open(path, now)
    for files in ((path, new), (new, path)):
        with pytest.raises(ConfigError, match="they differ in encoding_revision"):
            load_outcomes(*files)
    of_before = run_header(Settings.load(encoding_context="bos"), {}, made, **given)
    assert "encoding_revision" not in of_before


def test_runs_of_other_modes_are_joined(tmp_path: Path) -> None:
    first = save_outcomes(tmp_path / "a.jsonl", ["full", "reuse"])
    second = save_outcomes(tmp_path / "b.jsonl", ["full", "fused"], questions=2)
    joined = load_outcomes(first, second)["one"]
    assert [one.mode for one in joined] == ["full", "reuse", "fused"]
    assert [[o.kl for o in one.outcomes] for one in joined] == [[0, 1]] * 3
    parameters = {"recompute_ratio": 0.15, "attention": 0.5}
    assert joined[2] == ModeOutcomes("fused", "fused", parameters, [outcome(0), outcome(1)])
    (tmp_path / "b.jsonl").write_bytes(second.read_bytes()[:-5])  # it is being written
    assert len(load_outcomes(first, second)["one"][0].outcomes) == 1
    other = save_outcomes(tmp_path / "c.jsonl", ["fused"], max_tokens=9)
    with pytest.raises(ConfigError, match="cannot be compared: they differ in max_tokens"):
        load_outcomes(first, other)
    changed = save_outcomes(tmp_path / "d.jsonl", ["fused"], model="b2")
    with pytest.raises(ConfigError, match="they differ in the model's content. Load them one by"):
        load_outcomes(first, changed)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = save_outcomes(tmp_path / "a.jsonl", ["full"])
    header = json.loads(path.read_text().partition("\n")[0])
    with pytest.raises(SourceError, match="missing.jsonl: No such file"):
        load_outcomes(tmp_path / "missing.jsonl")
    for text in ("some text", "some text\nand more\n", '{"format": "other"}\n', "[]\n"):
        (tmp_path / "other").write_text(text)
        for use in (load_outcomes, lambda file: OutcomesFile.open(file, header)):
            with pytest.raises(ConfigError, match="is not a file of outcomes of this version"):
                use(tmp_path / "other")
        assert (tmp_path / "other").read_text() == text
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], '{"question": 1}\n', *lines[2:]]))
    with pytest.raises(SourceError, match="line 3 of .* is damaged: remove it"):
        OutcomesFile.open(path, header)
    path.write_text(lines[0])
    with pytest.raises(SourceError, match="holds no outcomes: `ragcache eval --save` writes"):
        load_outcomes(path)
    with pytest.raises(ConfigError, match="cannot save outcomes in .*: No such file or directory"):
        OutcomesFile.open(tmp_path / "no" / "run.jsonl", header)


def test_a_header_that_was_not_finished_is_begun_anew(tmp_path: Path) -> None:
    path = save_outcomes(tmp_path / "a.jsonl", ["full"], questions=0)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        save_outcomes(path, ["full"], questions=0)
        assert path.read_bytes() == whole


def test_a_file_is_of_one_run_at_a_time(tmp_path: Path) -> None:
    header = run_header(Settings.load(), {}, {}, max_tokens=2, instruction="")
    first = OutcomesFile.open(tmp_path / "a.jsonl", header)
    with pytest.raises(ConfigError, match="another process saves outcomes in"):
        OutcomesFile.open(tmp_path / "a.jsonl", header)
    first.close()
    OutcomesFile.open(tmp_path / "a.jsonl", header).close()


def damage(line: str, **changes: Any) -> str:
    return json.dumps(json.loads(line) | changes)


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (2, {"outcomes": {}}),
        (2, {"outcomes": {"full": {}, "reuse": {}}}),
        (2, {"outcomes": {"full": asdict(outcome(0)) | {"f1": "x"}}}),
        (2, {"question": 77}),
        (2, {"question": "0"}),
        (2, {"dataset": "other"}),
        (1, {"modes": 5}),
        (1, {"modes": {"full": 1}}),
        (1, {"datasets": [1]}),
        (1, {"datasets": {"one": {"digest": "a"}}}),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, number: int, changes: dict[str, Any]) -> None:
    path = save_outcomes(tmp_path / "run.jsonl", ["full"])
    header = json.loads(path.read_text().splitlines()[0])
    lines = path.read_text().splitlines()
    lines[number - 1] = damage(lines[number - 1], **changes)
    path.write_text("\n".join(lines) + "\n")
    for use in (lambda: load_outcomes(path), lambda: OutcomesFile.open(path, header)):
        with pytest.raises(SourceError, match=rf"line {number} of .*run.jsonl.* is damaged"):
            use()


def test_outcomes_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    path = save_outcomes(tmp_path / "run.jsonl", ["full"])
    lines = path.read_text().splitlines()
    lines[2] = damage(lines[2], model="b2")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SourceError, match="outcomes of two models: line 3 is of another one"):
        load_outcomes(path)


def test_a_device_is_refused_before_it_is_read() -> None:
    with pytest.raises(ConfigError, match="/dev/zero is not a regular file"):
        OutcomesFile.open(Path("/dev/zero"), {})
    with pytest.raises(ConfigError, match="/dev/zero is not a regular file"):
        load_outcomes(Path("/dev/zero"))


def test_files_without_a_common_question_are_refused(tmp_path: Path) -> None:
    one = save_outcomes(tmp_path / "one.jsonl", ["full"])
    two = save_outcomes(tmp_path / "two.jsonl", ["reuse"])
    header, first, *others = one.read_text().splitlines(keepends=True)
    one.write_text(header + first)
    two.write_text(
        "".join([two.read_text().splitlines(keepends=True)[0], *others]).replace("full", "reuse")
    )
    with pytest.raises(SourceError, match="no question of one in common: continue their runs"):
        load_outcomes(one, two)


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_is_named_and_the_run_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = save_outcomes(tmp_path / "run.jsonl", ["full"], questions=1)
    header = json.loads(path.read_text().splitlines()[0])
    saved = OutcomesFile.open(path, header)
    file, left = saved._file, [room]
    assert file is not None
    write = file.write

    class Full:
        def write(self, data: bytes) -> int:
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data[: left.pop()])

    monkeypatch.setattr(saved, "_file", Full())
    with pytest.raises(ConfigError, match="cannot be saved in .*: No space left on device. Make"):
        saved.append("one", 1, AskedQuestion("a1", {"full": outcome(0)}))
    file.close()
    again = OutcomesFile.open(path, header)
    assert list(again.known["one"]) == [0] and again.torn == bool(room)
    again.close()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ConfigError, match="cannot be saved in .*: No locks available. Make room"):
        save_outcomes(tmp_path / "run.jsonl", ["full"])
