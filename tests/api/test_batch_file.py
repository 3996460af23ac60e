"""``ragcache batch``: the answers of the routes, in the order of the requests, once each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ragcache.api import batch_file
from ragcache.api import batch_file as module
from ragcache.api.batch_file import iter_answer_batch, read_batch
from ragcache.core.precompute import drive
from ragcache.errors import SourceError
from ragcache.rag import RagCache
from tests import scene
from tests.cli.test_commands import Run, model, notes, run

__all__ = ["model", "notes", "run"]  # fixtures

GIVEN = ["Her father built boats.", "The mill grinds no more."]
CHAT: list[dict[str, str]] = [{"role": "user", "content": "Who built boats?"}]
ASKED: list[dict[str, Any]] = [
    {"question": "Who keeps a parrot?", "max_tokens": 3},
    {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "ragcache",
            "messages": CHAT,
            "documents": GIVEN,
            "ragcache": {"misses": "consistent"},  # the same answer, whatever is stored
        },
    },
    {"custom_id": "q", "url": "/v1/query", "body": {"question": "Where is the mill?", "top_k": 1}},
    {"custom_id": "again", "question": "Who keeps a parrot?", "mode": "reuse", "max_tokens": 3},
]
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"question": " "}, 400, "question is empty"),
    ({"question": "Who?", "colour": 1}, 400, "colour: "),
    ({"url": "/v1/embeddings", "body": {}}, 400, "POST to /v1/query or"),
    ({"body": {"question": "Who?", "stream": True}}, 400, "no streams"),
    ({"question": "Who?", "mode": "blend"}, 400, "mode 'blend' is unknown"),
    ({"question": "word " * 600}, 400, "has a context of 512"),
    (
        {
            "url": "/v1/chat/completions",
            "body": {"model": "gpt", "messages": [{"role": "user", "content": "Who?"}]},
        },
        404,
        "there is no model 'gpt' here",
    ),
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "q.jsonl", ASKED)


def write(path: Path, asked: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in asked))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(path: Path) -> RagCache:
    cache = scene.small(path, ram_bytes=1 << 20)
    cache.add(scene.DOCUMENTS)
    cache.ask("Who?", chunks=GIVEN)  # which are stored from here on
    return cache


def texts(path: Path) -> list[str]:
    bodies = [one["response"]["body"] for one in results(path)]
    return [
        body["choices"][0]["message"]["content"] if "choices" in body else body["answer"]
        for body in bodies
    ]


def test_answers_are_those_of_questions_asked_one_by_one(tmp_path: Path, questions: Path) -> None:
    out = tmp_path / "out.jsonl"
    with opened(tmp_path / "store") as cache:
        done = drive(iter_answer_batch(cache, read_batch(questions), out), None)
        wanted = [
            cache.ask(messages=CHAT, chunks=GIVEN).text,
            cache.ask("Where is the mill?", top_k=1).text,
        ]
    assert (done.requests, done.answered, done.resumed, done.failed) == (4, 4, 0, 0)
    assert [one["custom_id"] for one in results(out)] == ["request-1", "chat", "q", "again"]
    assert texts(out)[1:3] == wanted
    first = results(out)[0]["response"]["body"]
    assert first["usage"]["completion_tokens"] == 3 and first["object"] == "ragcache.answer"
    assert results(out)[1]["response"]["body"]["object"] == "chat.completion"
    assert not (tmp_path / "out.jsonl.part").exists()


def test_stopped_and_run_again_it_answers_what_is_left(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with opened(tmp_path / "store") as cache:
        drive(iter_answer_batch(cache, read_batch(questions), tmp_path / "whole.jsonl"), None)
        answered, calls = module._answer, list[int]()

        def stops(cache: Any, request: module.BatchLine, ask: Any) -> Any:
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(request.number)
            return answered(cache, request, ask)

        monkeypatch.setattr(module, "_answer", stops)
        with pytest.raises(KeyboardInterrupt):
            drive(iter_answer_batch(cache, read_batch(questions), out), None)
        part.write_bytes(part.read_bytes() + b'[3, "0')  # killed while it wrote
        monkeypatch.setattr(module, "_answer", answered)
        done = drive(iter_answer_batch(cache, read_batch(questions), out), None)
    assert (done.answered, done.resumed) == (2, 2) and not part.exists()
    assert texts(out) == texts(tmp_path / "whole.jsonl")


def test_a_line_that_was_changed_is_answer_anew(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with opened(tmp_path / "store") as cache:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                drive(iter_answer_batch(cache, read_batch(questions), out), None)
        write(questions, [{"question": "Who sings?"}, *ASKED[1:]])
        done = drive(iter_answer_batch(cache, read_batch(questions), out), None)
    assert (done.answered, done.resumed) == (1, 3)
    assert len(results(out)) == 4


@pytest.mark.parametrize("reorder", [True, False])
def test_what_is_wrong_with_a_request_is_its_result(tmp_path: Path, reorder: bool) -> None:
    asked = write(tmp_path / "q.jsonl", [one for one, _, _ in WRONG] + ASKED[:1])
    asked.write_text(asked.read_text() + "no json\n\n[]\n")
    out = tmp_path / "out.jsonl"
    with opened(tmp_path / "store") as cache:
        done = drive(iter_answer_batch(cache, read_batch(asked), out, reorder=reorder), None)
    found = results(out)
    assert (done.requests, done.failed) == (len(WRONG) + 3, len(WRONG) + 2)
    for one, (_, status, message) in zip(found, WRONG, strict=False):
        assert one["response"]["status_code"] == status
        assert message in one["error"]["message"]
        assert one["response"]["body"]["error"]["message"] == one["error"]["message"]
    assert found[len(WRONG)]["error"] is None
    assert "is not valid JSON" in found[-2]["error"]["message"]
    assert "it is not an object" in found[-1]["error"]["message"]


def test_two_of_one_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [ASKED[1], ASKED[1]])
    with pytest.raises(SourceError, match="lines 1 and 2 have the same custom_id"):
        read_batch(path)


def test_the_command(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model)
    write(Path("q.jsonl"), ASKED)
    asked = ("batch", "q.jsonl", "--out", "a.jsonl", "--ratio", 0.15, "--max-tokens", 4)
    code, out, _ = run(*asked)
    assert code == 0 and "4 of 4 requests answered" in out and "0 failed" in out
    first = texts(Path("a.jsonl"))
    code, out, _ = run(*asked, "--no-reorder", "--ram-bytes", "1MB")
    assert code == 0 and texts(Path("a.jsonl")) == first
    write(Path("q.jsonl"), [*ASKED, {"question": "Who?", "rato": 1}])
    code, out, _ = run(*asked)
    assert code == 3 and "4 of 5 requests answered" in out and "1 failed" in out
    write(Path("q.jsonl"), [{"question": " "}])
    code, out, _ = run(*asked)
    assert code == 3 and "1 failed" in out
    code, _, err = run("batch", "gone.jsonl", "--out", "a.jsonl")
    assert code == 1 and "cannot read the questions in gone.jsonl" in err
    code, _, err = run("batch", "q.jsonl", "--out", "no/a.jsonl")
    assert code == 1 and "there is no folder no" in err


def test_a_line_of_a_batch_has_known_fields(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"body": {"question": "Who?"}, "colour": "red"}\n', encoding="utf-8")
    (request,) = batch_file.read_batch(file)
    assert "colour: unknown field: leave it out" in str(request.body)
