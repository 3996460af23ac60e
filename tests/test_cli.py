"""The command line, as a person meets it: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ragcache import cli, opening
from ragcache.answer import AnswerStream
from ragcache.cli import options
from ragcache.retriever.embed import HashEmbedder
from ragcache.store import DiskStore
from tests import scene

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``ragcache ARGS`` in an empty folder: exit code, what it printed, what it complained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options.out, "width", 300)  # else as when it was made, at the first import
    monkeypatch.setattr(opening, "embedder_of", lambda *_: HashEmbedder())

    def ragcache(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ragcache", *map(str, args)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return ragcache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return scene.save_model(tmp_path / "llama")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for document in scene.DOCUMENTS:
        (folder / f"{document.id}.txt").write_text(document.text)
    return folder


def test_index_then_query(run: Run, notes: Path, model: Path) -> None:
    code, out, _ = run("index", notes, "--model", model)
    assert code == 0 and out.startswith("3 documents indexed")
    code, out, _ = run("index", notes)
    assert code == 0 and out.startswith("0 documents indexed (0 chunks), 3 unchanged; KV of 0")
    code, out, err = run("query", "Where does Mira live?", "--explain", "--max-tokens", 4)
    assert code == 0 and err == ""
    assert "fused: " in out and "charged" in out and "layers" in out and "stored" in out
    assert "- Speeds as measured on 20" in out and "- Predicted: first token after" in out
    assert "- Measured: first token after" in out
    code, out, _ = run("query", "Where?", "--mode", "reuse", "--top-k", 1)
    assert code == 0 and "charged" not in out


def test_an_answer_begins_where_its_line_does(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("index", notes, "--model", model)
    monkeypatch.setattr(AnswerStream, "__iter__", lambda stream: iter([" ", " In", " Oslo"]))
    code, out, _ = run("query", "Where does Mira live?", "--max-tokens", 1)
    assert code == 0 and out == "In Oslo\n"


def test_a_report_is_a_page_that_compares(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model)
    asked = ("query", "Where does Mira live?", "--max-tokens", 2)
    code, out, _ = run(*asked, "--report", "out.html", "--compare", "reuse", "--compare", "full")
    assert code == 0 and " fused " in out and " reuse " in out and " full " in out
    written = Path("out.html").read_text()
    assert all(f'"mode":"{mode}"' in written for mode in ("fused", "reuse", "full"))
    code, out, err = run(*asked, "--report", ".")
    assert code == 1 and out == "" and "cannot write the report to .: it is a folder" in err


def test_profile_measures_what_auto_goes_by(run: Run, notes: Path, model: Path) -> None:
    code, _, err = run("profile", "--model", model)
    assert code == 1 and "there is no store in ragcache-store" in err
    Path("ragcache-store").mkdir()
    code, _, err = run("profile", "--model", model)
    assert code == 1 and "no store in" in err and "make one with `ragcache index`" in err
    DiskStore("ragcache-store").close()
    code, _, err = run("profile", "--model", model)
    assert code == 1 and "holds no KV that this model can use" in err
    run("index", notes, "--model", model)
    code, out, err = run("profile")
    assert code == 0 and err == ""
    assert "a computed token" in out and "a layer of a chunk" in out
    code, out, _ = run("query", "Who?", "--ratio", "auto", "--explain", "--max-tokens", 1)
    assert code == 0 and "`ragcache profile` measures anew" in out
    code, out, _ = run("query", "Who?", "--ratio", "0.3", "--explain", "--max-tokens", 1)
    assert code == 0 and "Predicted" not in out


def test_models_says_what_the_store_can_use(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model)
    code, out, _ = run("models", "--model", model)
    assert code == 0
    assert "4 layers, 2 KV heads of 16, float32" in out
    assert "kernels: torch, on a CPU" in out
    assert all(f in out for f in ("weights", "tokenizer", "template", "chunks built for llama@"))


def test_eval_prints_a_table_and_writes_json(run: Run, model: Path, tmp_path: Path) -> None:
    context = {
        "chunks": ["Mira plays.", "She sings."],
        "questions": [{"question": "Who?", "answers": ["Mira"], "kind": "split"}],
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(context) + "\n")
    code, out, _ = run(
        "eval", "--dataset", "q.jsonl", "--model", model, "--json", "out.json", "--max-tokens", 2
    )
    assert code == 0 and "split" in out and "cacheblend" in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert {f["mode"] for f in figures} >= {"full", "reuse", "cacheblend"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["query", "Who?", "--mode", "blend"], "mode 'blend' is unknown: use one of full"),
        (["query", "Who?", "--ratio", "1.5"], "setting ratio = 1.5 cannot be"),
        (["query", "Who?", "--ratio", "much"], "or input should be 'auto'"),
        (["query", " "], "the question is empty"),
        (["query", "Who?", "--top-k", "0"], "setting top_k = 0 cannot be"),
        (["query", "Who?", "--temperature", "-1"], "setting temperature = -1.0 cannot be"),
        (["query", "Who?", "--store", "nowhere"], "there is no store in nowhere. Make one"),
        (["query", "Who?", "--model", "no/such-model"], "cannot load the model 'no/such-model'"),
        (["index", "missing.txt"], "missing.txt"),
        (["eval", "--dataset", "missing.json"], "cannot read the questions in missing.json"),
        (["eval", "--limit", "0"], "the limit is 0"),
        (["serve", "--host", "0.0.0.0"], "no API keys are given: anybody could read"),
        (["serve", "--keys", "nowhere"], "cannot read the API keys in nowhere"),
    ],
)
def test_errors_are_one_message(
    run: Run, notes: Path, model: Path, args: list[str], message: str
) -> None:
    run("index", notes, "--model", model)
    code, out, err = run(*args)
    assert code == 1 and out == ""
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    code, out, _ = run("index", notes)
    assert "KV of 0 chunks computed" in out  # nothing was lost


def test_an_unreadable_pdf_is_named_and_nothing_is_lost(run: Run, notes: Path, model: Path) -> None:
    (notes / "broken [b].pdf").write_bytes(b"%PDF-1.7\nnot a pdf at all")
    code, _, err = run("index", notes, "--model", model)
    assert code == 1 and "broken [b].pdf" in err
    assert "leave such documents out: --skip-errors" in err
    code, out, err = run("index", notes, "--model", model, "--skip-errors")
    assert code == 0 and out.startswith("3 documents indexed")
    assert "skipped: " in err and "broken [b].pdf" in err


def test_a_document_without_text_is_named(run: Run, notes: Path, model: Path) -> None:
    (notes / "blank [i].md").write_text("\n  \n")
    code, out, err = run("index", notes, "--model", model)
    assert code == 0 and out.startswith("4 documents indexed")
    assert err.count("no text: ") == 1 and "blank [i].md: it makes no chunk" in err


def test_another_model_or_tokenizer_is_refused(
    run: Run, notes: Path, model: Path, tmp_path: Path
) -> None:
    run("index", notes, "--model", model)
    weights = scene.save_model(tmp_path / "other", seed=1)
    tokenizer = scene.save_model(tmp_path / "retokenized")
    from transformers import AutoTokenizer

    changed = AutoTokenizer.from_pretrained(tokenizer)
    changed.add_tokens(["<new>"])
    changed.save_pretrained(tokenizer)
    for other in (weights, tokenizer):
        code, _, err = run("query", "Who?", "--model", other)
        assert code == 1 and "stored chunks are usable: built for llama@" in err
    assert run("query", "Who?")[0] == 0


def test_a_truncated_store_is_refused(run: Run, notes: Path, model: Path, tmp_path: Path) -> None:
    run("index", notes, "--model", model)
    data = next((tmp_path / "ragcache-store").rglob("data.mdb"))
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 3])
    code, _, err = run("query", "Who?")
    assert code == 1 and err.startswith("error: ") and "ragcache-store" in err
    data.write_bytes(whole)
    assert run("query", "Who?")[0] == 0


def test_documents_are_listed_and_deleted(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model, "--ttl", "12h", "--pin")
    code, out, _ = run("documents")
    assert code == 0 and out.count("yes") == 3 and "20" in out
    name = next(word for word in out.split() if word.endswith("holt.txt"))
    code, out, err = run("delete", name, "nobody")
    assert code == 1 and "1 documents deleted" in out
    assert "there is no document 'nobody': `ragcache documents` lists them" in err
    assert "holt.txt" not in run("documents")[1]
    (notes / "towns.jsonl").write_text('{"id": "bexley", "text": "Bexley has a mill."}\n')
    run("index", notes)
    _, _, err = run("delete", "towns.jsonl")
    assert "; that file has documents such as 'towns.jsonl#bexley'" in err
    code, _, err = run("index", notes, "--ttl", "soon")
    assert code == 1 and "'soon' is no length of time: give one such as 90s" in err


def test_a_bounded_store_evicts(run: Run, notes: Path, model: Path) -> None:
    code, out, _ = run("index", notes, "--model", model, "--max-bytes", "20kB")
    assert code == 0 and out.startswith("3 documents indexed")
    code, out, _ = run("verify")
    assert code == 0 and 0 < int(out.split(" chunks")[0].split()[-1]) < 5
    code, out, _ = run("query", "Where does Mira live?", "--max-tokens", 2)
    assert code == 0
    code, _, err = run("index", notes, "--max-bytes", "much")
    assert code == 1 and "setting max_bytes = 'much' cannot be" in err


def test_simulate_a_trace(run: Run, tmp_path: Path, model: Path) -> None:
    lines = [json.dumps({"chunks": [["a", 100], [name, 100]]}) for name in "bcbcbc"]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    code, out, _ = run("simulate", "trace.jsonl", "--model", model, "--capacity", "150kB")
    assert code == 0 and all(name in out for name in ("lru", "pgdsf", "craft", "belady", "bound"))
    (tmp_path / "trace.jsonl").write_text('{"chunks": [1]}')
    code, _, err = run("simulate", "trace.jsonl")
    assert code == 1 and "trace.jsonl:1: expected" in err
    code, _, err = run("simulate", "zipf", "--capacity", "much")
    assert code == 1 and "'much' is no size: give one such as 500MB" in err


@pytest.mark.parametrize("codec", ["int8", "cachegen"])
def test_a_store_keeps_its_codec(run: Run, notes: Path, model: Path, codec: str) -> None:
    run("index", notes, "--model", model, "--codec", codec)
    _, out, _ = run("query", "Where does Mira live?", "--mode", "reuse", "--max-tokens", 2)
    code, out, _ = run("doctor")  # with the codec that the store was begun with
    assert code == 0 and "can use 9 of 9 chunks" in out
    code, out, _ = run("index", notes)
    assert code == 0 and "KV of 0 chunks computed" in out
    code, out, _ = run("index", notes, "--codec", "raw")
    assert code == 0 and "KV of 9 chunks computed" in out
    code, _, err = run("index", notes, "--codec", "zip")
    assert code == 1 and "codec 'zip' is unknown: use one of raw, int8, fp8, cachegen" in err


def test_doctor_and_compact(run: Run, notes: Path, model: Path, tmp_path: Path) -> None:
    run("index", notes, "--model", model)
    code, out, err = run("doctor")
    assert code == 0 and err == ""
    for what in ("file system", "readahead", "free space", "disk speed", "LMDB map", "unused"):
        assert what in out
    assert "/s written" in out and "can use 9 of 9 chunks" in out and "readers" in out
    other = scene.save_model(tmp_path / "other", seed=1)
    code, out, _ = run("doctor", "--model", other)
    assert code == 1 and "can use 0 of 9 chunks: they are for llama@" in out
    code, out, _ = run("compact")
    assert code == 0 and "before" in out and "now" in out
    assert run("verify")[0] == 0


def test_convert_and_verify(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model)
    code, out, _ = run("convert", "files")
    files = list(Path("ragcache-store").rglob("kv/*/*"))
    assert code == 0 and out == f"{len(files)} chunks moved\n"
    assert run("convert", "files")[1] == "0 chunks moved\n"
    code, out, _ = run("verify")
    assert code == 0 and f"{len(files)} chunks, 0 records damaged" in out
    files[0].write_bytes(files[0].read_bytes()[:-1])
    code, out, _ = run("verify")
    assert code == 1 and "truncated: " in out and f"{len(files)} chunks, 1 records damaged" in out
    code, out, _ = run("verify", "--repair")
    assert code == 0 and f"{len(files) - 1} chunks, 1 records dropped" in out
    assert run("verify")[0] == 0
    code, _, err = run("convert", "tape")
    assert code == 1 and "layout is 'tape': it must be one of auto, records, files" in err
    code, _, err = run("verify", "--store", "elsewhere")
    assert code == 1 and "there is no store in elsewhere. Make one: ragcache index" in err
