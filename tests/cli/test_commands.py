"""The command line: output, error messages and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ragcache
from ragcache import cli, setup
from ragcache.cli import app, incoming, output, store_commands
from ragcache.cli.render import stages
from ragcache.core import portions
from ragcache.core.generate import GenerationStream
from ragcache.errors import ConfigError, SourceError
from ragcache.eval.dataset import load_dataset
from ragcache.retriever.embed import HashEmbedder
from ragcache.retriever.rerank import CrossEncoderReranker
from ragcache.settings import Settings
from ragcache.store import Catalog, DiskStore
from ragcache.types import Document
from tests import scene
from tests.cross_encoder import make_cross_encoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``ragcache ARGS`` in an empty folder: exit code, what it printed, what it complained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output.out, "width", 300)  # else as when it was made, at the first import
    monkeypatch.setattr(stages, "EVERY_S", 3600.0)  # however slow this machine is
    monkeypatch.setattr(setup, "load_embedder", lambda *_: HashEmbedder())

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


def test_help_and_version(run: Run) -> None:
    code, out, err = run("--version")
    assert (code, err) == (0, "") and out.startswith(f"ragcache {ragcache.__version__} (Python 3.")
    assert "torch " in out
    for flag in ("-h", "--help"):
        code, out, _ = run(flag)
        assert code == 0 and "--install-completion" in out and "--quiet" in out and "index" in out
        code, out, _ = run("index", flag)
        assert code == 0 and "--chunk-tokens" in out and "--json" in out
    code, out, err = run()
    assert code == 2 and "Documents and questions" in out + err


def test_what_is_mistyped_is_put_right(run: Run) -> None:
    code, _, err = run("stats", "--sotre", "s")
    assert code == 2 and "--store" in err
    code, _, err = run("statz")
    assert code == 2 and "Did you mean 'stats'?" in err
    code, _, err = run("--quiet", "stats", "--verbose")
    assert code == 2 and "give one" in err


def test_an_old_option_still_works_and_names_the_new_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "deprecated: --levels is now called --remote-codecs: use that name, because the next "
    code, _, err = run("push", "--levels", "int8", "--store", "nowhere")
    assert code == 1 and err.count(said) == 1 and "there is no store in nowhere" in err
    code, out, _ = run("push", "--help")
    assert "--remote-codecs" in out and "--levels" not in out
    code, _, err = run("push", "--levels", "int8", "--remote-codecs", "fp8")
    assert code == 1 and "--levels and --remote-codecs are two names of one setting" in err
    assert "--compile is now called --encoding-context" in run("index", "x", "--compile", "bos")[2]
    monkeypatch.setenv("RAGCACHE_LEVELS", "int8")
    code, _, err = run("push", "--store", "nowhere")
    assert err.count("deprecated: RAGCACHE_LEVELS is now called RAGCACHE_REMOTE_CODECS: ") == 1


def test_other_warnings_are_shown_as_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        store_commands, "check_exists", lambda *_: warnings.warn("odd", stacklevel=1)
    )
    with pytest.warns(UserWarning, match="odd"):
        run("stats")


def test_tab_completes() -> None:
    typed = {"COMP_WORDS": "ragcache comp", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['ragcache']; from ragcache.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | typed | {"_RAGCACHE_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["compact"], "")


def test_quiet_prints_results_and_verbose_prints_why(run: Run, notes: Path, model: Path) -> None:
    (notes / "blank.md").write_text(" ")
    code, out, err = run("index", notes, "--model", model)
    assert code == 0 and "no text: " in err
    for args in (("-q", "index", notes, "--pin"), ("index", notes, "--pin", "--quiet")):
        code, out, err = run(*args)
        assert code == 0 and out.startswith("0 documents indexed") and err == ""
    code, out, err = run("-q", "query", " ")
    assert code == 1 and out == "" and err.startswith("error: the question is empty")
    code, _, err = run("query", " ", "-v")
    assert code == 1 and "Traceback" in err and "error: the question is empty" in err
    assert "Traceback" not in run("query", " ")[2]


#: What each command is asked in the test of ``--json``, in this order.
ASKED = {
    "index": ["notes", "--model", "llama"],
    "query": ["Who?", "--max-tokens", "2", "--compare", "full"],
    "precompute": ["notes"],
    "batch": ["asked.jsonl", "--out", "answers.jsonl"],
    "eval": ["--dataset", "q.jsonl", "--model", "llama", "--mode", "full", "--max-tokens", "2"],
    "calibrate": ["q.jsonl", "--model", "llama", "--mode", "reuse", "--max-tokens", "2"],
    "profile": [],
    "models": [],
    "plan": ["--chunks", "1000"],
    "simulate": ["trace.jsonl", "--model", "llama", "--capacity", "150kB"],
    "documents": [],
    "delete": ["notes/holt.txt"],
    "stats": [],
    "verify": [],
    "convert": ["files"],
    "compact": [],
    "doctor": [],
    "push": ["--remote", "REMOTE"],
    "pull": ["--remote", "REMOTE"],
}


def test_every_command_that_prints_figures_prints_them_as_json(
    run: Run, notes: Path, model: Path, tmp_path: Path
) -> None:
    """One object on stdout, with the keys that docs/scripting.md names for it."""
    question = {"chunks": ["Mira plays.", "She sings."], "question": "Who?", "answers": ["Mira"]}
    context = {"chunks": question["chunks"], "questions": [{"question": "Who?", "answers": ["M"]}]}
    Path("q.jsonl").write_text(json.dumps(context) + "\n")
    Path("asked.jsonl").write_text('{"question": "Who?", "max_tokens": 1}\n')
    Path("trace.jsonl").write_text('{"chunks": [["a", 100], ["b", 100]]}\n' * 3)
    page = (Path(cli.__file__).parents[2] / "docs/scripting.md").read_text()
    rows = re.findall(r"^\| (`[a-z`, ]+`) \| (.*) \|$", page, re.MULTILINE)
    every = {name for panel in cli.COMMANDS.values() for name in panel}
    keys = {
        name: cell
        for names, cell in rows
        for name in re.findall("[a-z]+", names)
        if name in every  # the page has a table of other keys too
    }
    assert every - {"serve"} == keys.keys() == ASKED.keys() | {"demo"}
    for command, args in ASKED.items():
        given = [(tmp_path / "far").as_uri() if arg == "REMOTE" else arg for arg in args]
        if command == "delete":
            given = [json.loads(run("documents", "--json")[1])["documents"][0]["id"]]
        code, out, err = run(command, *given, "--json")
        assert code == 0, f"{command}: {err}"
        found = json.loads(out)
        assert isinstance(found, dict) and out.isascii()
        missing = [key for key in found if f"`{key}`" not in keys[command]]
        assert not missing, f"{command} prints {missing}, which docs/scripting.md does not name"


def test_json_says_what_was_done_before_an_error(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model)
    name = json.loads(run("documents", "--json")[1])["documents"][0]["id"]
    code, out, err = run("delete", name, "nobody", "--json")
    assert code == 1 and json.loads(out) == {"deleted": [name], "missing": ["nobody"]}
    assert err.startswith("error: there is no document 'nobody'")
    code, out, err = run("stats", "--store", "nowhere", "--json")
    assert (code, out) == (1, "") and "there is no store in nowhere. Make one" in err


def test_no_document_can_command_the_terminal(run: Run, model: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202ea\nb"
    Path("e.jsonl").write_text(json.dumps({"id": hostile, "text": f"Mira {hostile} sings."}))
    code, out, err = run("index", "e.jsonl", "--model", model)
    assert code == 1 and "cannot be a document's id: it contains control characters" in err
    printed = out + err
    told = {"id": "e", "title": hostile, "text": f"Mira {hostile} sings."}
    Path("e.jsonl").write_text(json.dumps(told))
    code, out, err = run("index", "e.jsonl", "--model", model)
    assert code == 0
    printed += out + err
    with DiskStore("ragcache-store") as store:  # as releases before took it
        Catalog(store).put_document(Document(hostile, ""), [], HashEmbedder().embed([]), b"")
    for args in (("documents",), ("query", "Who sings?", "--explain", "--max-tokens", 2)):
        _, out, err = run(*args)
        printed += out + err
    assert "\\x1b]0;owned\\x07\\x1b[2J\\u202ea\\nb" in printed
    printed += "".join(run("delete", f"nobody {hostile}")[1:])
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}
    found = json.loads(run("documents", "--json")[1])["documents"]
    assert found[0]["id"] == hostile


def test_a_store_tells_what_models_it_has_kv_of(
    run: Run, notes: Path, model: Path, tmp_path: Path
) -> None:
    other = scene.save_model(tmp_path / "other", seed=1)
    run("index", notes, "--model", model, "--codec", "int8")
    code, out, _ = run("models")
    assert code == 0 and "3 documents; 9 chunks" in out and "can use 9 of 9 chunks" in out
    assert "this model" in out
    code, out, _ = run("models", "--model", other)
    assert code == 0 and "can use 0 of 9 chunks" in out and "this model" not in out
    found = json.loads(run("models", "--json")[1])["store"]
    ((built, held),) = found["built_for"].items()
    assert built.startswith("llama@") and held["chunks"] == 9 and held["payload_bytes"] > 0
    code, _, err = run("models", "--store", "elsewhere")
    assert code == 1 and "there is no store in elsewhere. Make one" in err


@pytest.mark.parametrize(
    ("command", "goes_on"), [("index", True), ("query", False), ("serve", None)]
)
def test_ctrl_c_says_whether_to_run_it_again(
    run: Run, notes: Path, monkeypatch: pytest.MonkeyPatch, command: str, goes_on: bool | None
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Settings, "load", interrupt)
    if goes_on is None:  # that is how it ends
        assert run(command) == (130, "", "")
        return
    code, out, err = run(command, notes)
    assert (code, out) == (130, "") and err.startswith("interrupted: ")
    assert ("run the same command again to continue" in err) is goes_on
    assert "Traceback" not in err and err.count("\n") == 1


def test_whoever_reads_may_go(tmp_path: Path) -> None:
    """``ragcache documents | head -1``: no traceback, whatever is still in a buffer."""
    with DiskStore(tmp_path / "s") as store:
        vectors = np.ones((0, 4), np.float32)
        for number in range(2000):
            Catalog(store).put_document(Document(f"document {number}", "text"), [], vectors, b"")
    # Unbuffered, Python drops what did not fit into the pipe, and does not even know.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for flags in ([], ["--json"]):
        command = [sys.executable, "-m", "ragcache", "documents", "--store", str(tmp_path / "s")]
        with subprocess.Popen(
            command + flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 141


def test_index_then_query(run: Run, notes: Path, model: Path) -> None:
    code, out, _ = run("index", notes, "--model", model)
    assert code == 0 and out.startswith("3 documents indexed")
    code, out, _ = run("index", notes)
    assert code == 0 and out.startswith("0 documents indexed (0 chunks), 3 unchanged; KV of 0")
    code, out, err = run("query", "Where does Mira live?", "--explain", "--max-tokens", 4)
    assert code == 0 and err == f"loading model {model}\n"
    assert "fused: " in out and "charged" in out and "layers" in out and "stored" in out
    assert "- Speeds as measured on 20" in out and "- Predicted: first token after" in out
    assert "- Measured: first token after" in out
    code, out, _ = run("query", "Where?", "--mode", "reuse", "--top-k", 1)
    assert code == 0 and "charged" not in out


def test_an_answer_follows_a_schema(run: Run, model: Path) -> None:
    Path("town.txt").write_text("Mira lived in Oslo.")
    assert run("index", "town.txt", "--model", model)[0] == 0
    Path("schema.json").write_text('{"enum": ["Oslo", "Bergen"]}')
    asked = ("query", "Where did Mira live?", "--max-tokens", 30, "--json-schema")
    code, out, _ = run(*asked, "schema.json")
    assert code == 0 and json.loads(out) in ("Oslo", "Bergen")
    Path("schema.json").write_text("{")
    for file, said in (("schema.json", "no JSON schema"), ("absent.json", "cannot be read")):
        code, _, err = run(*asked, file)
        assert code == 1 and said in err


def test_a_question_of_some_documents(run: Run, model: Path) -> None:
    records = [
        {"id": f"d{year}", "text": f"Mira lived in {town} {year}.", "metadata": {"year": year}}
        for year, town in ((1990, "mill"), (2000, "boat"), (2010, "bridge"))
    ]
    Path("towns.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert run("index", "towns.jsonl", "--model", model, "--chunk-tokens", 64)[0] == 0
    question = "Where is the mill?"
    asked = ("query", question, "--explain", "--max-tokens", 1, "--filter")
    code, out, _ = run(*asked, '{"year": {"$between": [1995, 2005]}}')
    assert code == 0 and "d2000#0" in out and "d1990#0" not in out
    code, out, _ = run(*asked, "{}", "--retrieval", "bm25", "--top-k", 1, "--mmr", 0.5)
    assert code == 0 and "d1990#0" in out
    code, out, err = run(*asked, "{}", "--min-score", 1, "--require-chunks")
    assert code == 4 and "with the filter and min_score 1.0" in err
    code, out, err = run(*asked, "{}", "--top-tokens", 1, "--require-chunks")
    assert code == 4 and "with the filter and top_tokens 1" in err
    code, out, err = run(*asked, "{}", "--rerank", 3)
    assert code == 1 and "there is no reranker: set reranker" in err
    folder = str(make_cross_encoder(Path("ranks")))
    texts = [str(record["text"]) for record in records]
    scores = CrossEncoderReranker(folder).scores(question, texts)
    best, worst = records[scores.argmax()]["id"], records[scores.argmin()]["id"]
    (nearest,) = set(re.findall(r"d\d+(?=#0)", run(*asked, "{}", "--top-k", 1)[1]))
    reranked = (*asked, "{}", "--reranker", folder, "--top-k", 1)
    code, out, _ = run(*reranked)
    assert code == 0 and f"{best}#0" in out and f"{worst}#0" not in out
    code, out, _ = run(*reranked, "--rerank", 0)
    assert code == 0 and f"{nearest}#0" in out
    code, out, err = run(*asked, "{}", "--retrieval", "sparse")
    assert code == 1 and "retrieval" in err and "hybrid" in err
    code, out, err = run(*asked, '{"year": 1}', "--require-chunks")
    assert code == 4 and "from the 3 chunks of the store with the filter" in err
    for given, said in (
        ("{year: 1}", "--filter is not JSON"),
        ('["year"]', 'filter is ["year"]: give an object'),
        ('{"year": {"$of": 1}}', "filter.year.$of is no operator"),
    ):
        code, out, err = run(*asked, given)
        assert code == 1 and out == "" and said in err and "loading" not in err


def test_an_answer_begins_where_its_line_does(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("index", notes, "--model", model)
    monkeypatch.setattr(GenerationStream, "__iter__", lambda stream: iter([" ", " In", " Oslo"]))
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
    assert code == 1 and "there is no store in" in err and "Make one: ragcache index PATH" in err
    DiskStore("ragcache-store").close()
    code, _, err = run("profile", "--model", model)
    assert code == 1 and "holds no KV that this model can use" in err
    run("index", notes, "--model", model)
    code, out, err = run("profile")
    assert code == 0 and err == f"loading model {model}\n"
    assert "computing a token" in out and "reading a layer of a chunk" in out
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
    assert all(f in out for f in ("weights", "tokenizer", "template"))
    assert "this model" in out and "can use 9 of 9 chunks" in out


def test_eval_prints_a_table_and_writes_json(run: Run, model: Path, tmp_path: Path) -> None:
    context = {
        "chunks": ["Mira plays.", "She sings."],
        "questions": [{"question": "Who?", "answers": ["Mira"], "kind": "split"}],
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(context) + "\n")
    code, out, _ = run(
        "eval", "--dataset", "q.jsonl", "--model", model, "--report", "out.json", "--max-tokens", 2
    )
    assert code == 0 and "split" in out and "cacheblend" in out
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert {f["mode"] for f in figures} >= {"full", "reuse", "cacheblend"}


def words(text: str) -> str:
    """Lines of a caption, joined."""
    return " ".join(text.split())


def test_eval_saves_outcomes_and_says_why_there_is_no_pgr(
    run: Run, model: Path, tmp_path: Path
) -> None:
    context = {
        "chunks": ["Mira plays.", "She sings."],
        "questions": [{"question": "Who?", "answers": ["Mira"]}],
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(context) + "\n")
    command = ["eval", "--dataset", "q.jsonl", "--model", model, "--max-tokens", 2]
    command += ["--mode", "none", "--mode", "full", "--instruction", "Be brief."]
    code, out, err = run(*command, "--save", "run.jsonl")
    assert code == 0 and "already" not in err
    assert "no PGR: F1 of full is 0.0 points above that of none, and it needs 25" in words(out)
    code, again, err = run(*command, "--save", "run.jsonl")
    assert (code, again) == (0, out) and "note: 1 of 1 questions are in run.jsonl already" in err
    code, _, err = run(*command, "--save", "run.jsonl", "--mode", "reuse")
    assert code == 1 and "error: run.jsonl has outcomes of another run (modes: none, full" in err
    saved = (tmp_path / "run.jsonl").read_text()
    for option, file in (("--report", "run.jsonl"), ("--save", "./q.jsonl")):
        code, out, err = run(*command, "--save", "run.jsonl", option, file)
        assert code == 1 and out == "" and "both name" in err and "different files" in err
    assert (tmp_path / "run.jsonl").read_text() == saved
    code, out, _ = run(*command[:-6], "--mode", "full", "--against", "full")
    assert code == 0 and "no PGR: it needs the modes full and none" in words(out)
    assert "minus full, in points" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["query", "Who?", "--mode", "blend"], "mode 'blend' is unknown: use one of full"),
        (["query", "Who?", "--ratio", "1.5"], "setting ratio = '1.5' is not valid"),
        (["query", "Who?", "--ratio", "much"], "or input should be 'auto'"),
        (["query", " "], "the question is empty"),
        (["query", "Who?", "--top-k", "0"], "setting top_k = 0 is not valid"),
        (["query", "Who?", "--temperature", "-1"], "setting temperature = -1.0 is not valid"),
        (["query", "Who?", "--store", "nowhere"], "there is no store in nowhere. Make one"),
        (["query", "Who?", "--tenant", "ann"], "PATH... --store ragcache-store --tenant ann"),
        (["documents", "--tenant", "ann"], "PATH... --store ragcache-store --tenant ann"),
        (["query", "Who?", "--model", "no/such-model"], "no/such-model is not on this machine"),
        (["index", "missing.txt"], "missing.txt"),
        (["eval", "--dataset", "missing.json"], "cannot read the questions in missing.json"),
        (["eval", "--limit", "0"], "the limit is 0"),
        (["eval", "--max-tokens", "0"], "max_tokens is 0: ask for at least 1"),
        (["calibrate", "--max-tokens", "0"], "max_tokens is 0: ask for at least 1"),
        (["calibrate", "--epsilon", "5"], "epsilon is 5.0: give a share from 0.0001 to 0.9999"),
        (["calibrate", "--escalate"], "--escalate is for a promise: give --epsilon too"),
        (["calibrate", "--save"], "--save records a promise: give --epsilon too"),
        (["serve", "--host", "0.0.0.0"], "there are no API keys: anybody could read"),
        (["serve", "--keys", "nowhere"], "cannot read the API keys in nowhere"),
    ],
)
def test_errors_are_one_message(
    run: Run, notes: Path, model: Path, args: list[str], message: str
) -> None:
    run("index", notes, "--model", model)
    code, out, err = run(*args)
    assert code == 1 and out == ""
    said = err.splitlines()[-1]
    assert said.startswith("error: ") and message in said and "Traceback" not in err
    code, out, _ = run("index", notes)
    assert "KV of 0 chunks computed" in out  # nothing was lost


def test_a_promise_is_calibrated_recorded_and_withdrawn(run: Run, notes: Path, model: Path) -> None:
    """`random` at every ratio, and at a ratio of 1, where it is full prefill."""
    run("index", notes, "--model", model)
    chunks = [{"chunks": [f"Mira {n}.", "She sings.", "Then.", "So."]} for n in range(3)]
    for each in chunks:
        each["questions"] = [{"question": who, "answers": ["M"]} for who in ("Who?", "What?")]  # type: ignore[misc]
    Path("q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in chunks))
    command = "calibrate", "q.jsonl", "--mode", "random:recompute_ratio=1.0", "--max-tokens", "2"
    given = *command, "--epsilon", "0.5", "--confidence", "0.8", "--save", "--escalate"
    code, out, err = run(*given, "--json")
    assert code == 0, err
    assert "3 of 6 questions are asked, one for each list of chunks" in err
    found = json.loads(out)
    assert found["promise"] == {
        "epsilon": 0.5,
        "confidence": 0.8,
        "disagreement": "answer",
        "max_tokens": 2,
    }
    assert found["saved"] and found["least"] == "random:recompute_ratio=1.0"
    [test] = found["candidates"]
    assert test["trial"] == {"questions": 3, "failures": 0} and test["is_promised"]
    assert test["least_margin"] == test["escalated"] == 0
    page = (Path(cli.__file__).parents[2] / "docs/scripting.md").read_text()
    assert not [key for key in (*found, *found["promise"], *test) if f"`{key}`" not in page]
    asked = "query", "Who?", "--explain", "--max-tokens", "2", "--mode", "random", "--ratio", "1"
    assert "This answer is covered." in run(*asked)[1]
    code, out, err = run(*given, "--epsilon", "0.1", "--disagreement", "tokens")
    assert code == 0 and "Nothing cheaper than full prefill can be promised" in out
    assert "With 13 more questions of which as few disagree" in out  # 16 without a failure
    assert "deleted: the earlier calibration" in err


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
    assert err.count("no text: ") == 1 and "blank [i].md: it has no chunks" in err


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
    assert code == 1 and "1 document deleted" in out
    assert "there is no document 'nobody': `ragcache documents` lists them" in err
    assert "holt.txt" not in run("documents")[1]
    (notes / "towns.jsonl").write_text('{"id": "bexley", "text": "Bexley has a mill."}\n')
    run("index", notes)
    _, _, err = run("delete", "notes/towns.jsonl")
    assert "; that file has documents such as 'notes/towns.jsonl#bexley'" in err
    code, _, err = run("index", notes, "--ttl", "soon")
    assert code == 1 and "'soon' is not a duration: give one such as 90s" in err


def test_a_bounded_store_evicts(run: Run, notes: Path, model: Path) -> None:
    code, out, _ = run("index", notes, "--model", model, "--max-bytes", "20kB")
    assert code == 0 and out.startswith("3 documents indexed")
    code, out, _ = run("verify")
    assert code == 0 and 0 < int(out.split(" chunk")[0].split()[-1]) < 5
    code, out, _ = run("query", "Where does Mira live?", "--max-tokens", 2)
    assert code == 0
    code, _, err = run("index", notes, "--max-bytes", "much")
    assert code == 1 and "setting max_bytes = 'much' is not valid" in err


def test_simulate_a_trace(run: Run, tmp_path: Path, model: Path) -> None:
    lines = [json.dumps({"chunks": [["a", 100], [name, 100]]}) for name in "bcbcbc"]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    code, out, _ = run("simulate", "trace.jsonl", "--model", model, "--capacity", "150kB")
    assert code == 0 and all(name in out for name in ("lru", "pgdsf", "craft", "belady", "bound"))
    (tmp_path / "trace.jsonl").write_text('{"chunks": [1]}')
    code, _, err = run("simulate", "trace.jsonl")
    assert code == 1 and "trace.jsonl:1: expected" in err
    code, _, err = run("simulate", "zipf", "--capacity", "much")
    assert code == 1 and "'much' is not a size: give one such as 500MB" in err


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
    assert code == 1 and "codec 'zip' is unknown: use one of raw, bfloat16, float16, int8" in err


def test_doctor_and_compact(run: Run, notes: Path, model: Path, tmp_path: Path) -> None:
    run("index", notes, "--model", model)
    code, out, err = run("doctor")
    assert code == 0 and err == f"loading model {model}\n"
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
    assert code == 1 and "truncated: " in out and f"{len(files)} chunks, 1 record damaged" in out
    code, out, _ = run("verify", "--repair")
    assert code == 0 and f"{len(files) - 1} chunks, 1 record dropped" in out
    assert run("verify")[0] == 0
    code, _, err = run("convert", "tape")
    assert code == 1 and "layout is 'tape': it must be one of auto, records, files" in err
    code, _, err = run("verify", "--store", "elsewhere")
    assert code == 1 and "there is no store in elsewhere. Make one: ragcache index" in err


def test_convert_to_another_codec(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--model", model)
    code, out, _ = run("convert", "--codec", "cachegen")
    assert code == 0 and re.fullmatch(r"\d+ chunks in codec cachegen: .* before, .* now\n", out)
    code, out, _ = run("query", "Where does Mira Holt live?", "--json")
    assert code == 0 and not any(part["miss"] for part in json.loads(out)["report"]["chunks"])
    code, _, err = run("convert", "files", "--codec", "int8")
    assert code == 1 and "no chunk can be encoded in codec int8" in err
    assert run("query", "Where does Mira Holt live?")[0] == 0
    code, _, err = run("convert")
    assert code == 1 and "say what to convert to: records, files or auto, or --codec" in err
    code, _, err = run("convert", "--codec", "tape")
    assert code == 1 and "codec 'tape' is unknown" in err
    code, _, err = run("convert", "--codec", "int8", "--store", "elsewhere")
    assert code == 1 and "there is no store in elsewhere. Make one: ragcache index" in err


def test_an_answer_from_nothing_says_so_first_and_by_its_exit_code(
    run: Run, model: Path, tmp_path: Path
) -> None:
    (empty := tmp_path / "empty").mkdir()
    (empty / "blank.txt").write_text(" ")
    run("index", empty, "--model", model)
    code, out, err = run("query", "Where?")
    assert code == 4 and out.strip()
    loading, said = err.splitlines()[:2]
    assert loading.startswith("loading model ")
    assert said.startswith("nothing to answer from: the 1 documents of the store have no text.")
    code, out, err = run("query", "Where?", "-q")
    assert code == 4 and out.strip() and err.startswith("nothing to answer from: ")
    code, out, err = run("query", "Where?", "--require-chunks")
    assert code == 4 and not out and "error: there are no chunks to answer from" in err
    (asked := tmp_path / "asked.jsonl").write_text('{"question": "Where?"}\n')
    code, out, err = run("batch", asked, "--out", tmp_path / "out.jsonl")
    assert code == 4 and "1 of 1 answers are from the model alone" in err
    page = tmp_path / "page.html"
    assert run("query", "Where?", "--report", page)[0] == 4
    assert '"no_chunks":"the 1 documents' in page.read_text()


def test_questions_without_chunks_are_told_of(run: Run, model: Path, tmp_path: Path) -> None:
    question = {"question": "Where?", "answers": ["There"], "ctxs": []}
    file = tmp_path / "asked.json"
    file.write_text(json.dumps([question]))
    code, _, err = run("eval", "--dataset", file, "--model", model)
    assert code == 4 and "there are no chunks to answer from: none are given" in err
    file.write_text(json.dumps([question, question | {"ctxs": [{"text": "A text."}]}]))
    code, _, err = run("eval", "--dataset", file, "--model", model, "--mode", "reuse")
    assert code == 0 and "1 of 2 questions of asked.json have no chunks" in err


def test_a_tenants_documents(run: Run, notes: Path, model: Path) -> None:
    code, out, _ = run("index", notes, "--model", model, "--tenant", "ann")
    assert code == 0 and out.startswith("3 documents indexed")
    assert run("query", "Where does Mira live?")[0] == 4
    code, out, err = run("query", "Where does Mira live?", "--tenant", "ann", "--explain")
    assert code == 0 and "nothing" not in err and "absent" not in out and "stale" not in out
    code, out, _ = run("documents", "--tenant", "ann")
    assert code == 0 and "holt" in out
    code, out, _ = run("delete", "notes/holt.txt", "--tenant", "ann")
    assert code == 0 and "1 document deleted" in out
    assert run("query", "Where?", "--tenant", "bob")[0] == 1
    assert "cannot be a tenant" in run("index", notes, "--tenant", "../ann")[2]


def test_documents_whose_file_is_gone_are_told_and_pruned(
    run: Run, notes: Path, model: Path, tmp_path: Path
) -> None:
    (notes / "towns.jsonl").write_text('{"id": "a", "text": "One."}\n{"id": "b", "text": "Two."}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holt.txt").write_text("Another file of that name.")
    assert run("index", notes, "other", "--model", model)[0] == 0
    (notes / "towns.jsonl").write_text('{"id": "a", "text": "One."}\n')
    first = sorted(notes.glob("*.txt"))[0]
    first.unlink()
    code, out, err = run("index", "./notes/")
    assert code == 0 and out.startswith("0 documents indexed (0 chunks), 3 unchanged")
    assert f"gone: the files of 2 documents, such as 'notes/{first.name}'. Questions" in err
    (notes / "towns.jsonl").write_bytes(b"\xff")  # there, but it cannot be read
    code, _, err = run("index", notes, "--prune", "--skip-errors")
    assert "deleted: 1 document whose files do not exist any more, such as" in err
    kept = run("documents")[1]
    assert first.name not in kept.replace("other/", "") and "towns.jsonl#a" in kept
    assert "other/holt.txt" in kept  # nobody asked for that folder


def test_folders_of_one_name_do_not_replace_each_other(
    run: Run, model: Path, tmp_path: Path
) -> None:
    for above in ("x", "y"):
        (tmp_path / above / "docs").mkdir(parents=True)
        (tmp_path / above / "docs" / "README.md").write_text(f"The readme of {above}.")
    assert run("index", "x/docs", "--model", model)[0] == 0
    code, _, err = run("index", "y/docs")
    assert code == 1 and "documents named docs/... came from" in err and "--root" in err
    assert run("index", "y/docs", "--root", ".")[0] == 0
    (tmp_path / "x").rename(tmp_path / "z")
    code, out, err = run("index", "z/docs")
    assert code == 0 and "1 unchanged" in out and "docs was indexed from" in err
    listed = run("documents")[1]
    assert "docs/README.md" in listed and "y/docs/README.md" in listed


def test_files_that_two_folders_name_are_told(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "docs" / "guide").mkdir(parents=True)
    (tmp_path / "docs" / "guide" / "a.md").write_text("The mill turns.")
    (tmp_path / "docs" / "guide" / "b.jsonl").write_text('{"id": "x", "text": "It stops."}')
    assert "under the name of another" not in run("index", "docs/guide", "--model", model)[2]
    for again in range(2):
        _, _, err = run("index", "docs")
        assert "note: 2 of these documents are also stored under the name of another" in err, again
        assert "'docs/guide/a.md', for example, as 'guide/a.md'" in err
    _, _, err = run("index", "docs/guide")  # the other way round
    assert "'guide/a.md', for example, as 'docs/guide/a.md'" in err
    run("delete", "guide/a.md", "guide/b.jsonl#x")
    assert "under the name of another" not in run("index", "docs")[2]


def test_ids_without_a_folder_are_renamed(run: Run, notes: Path, model: Path) -> None:
    run("index", notes, "--root", notes, "--model", model, "--pin")  # as they were named before
    names = sorted(path.name for path in notes.iterdir())
    (notes / names[0]).write_text("Another text.")
    code, out, err = run("index", notes)
    assert code == 0 and out.startswith("3 documents indexed") and "KV of 1 chunk computed" in out
    assert "renamed: 2 documents" in err and f"'{names[1]}' is now 'notes/{names[1]}'" in err
    assert f"note: 1 documents, such as '{names[0]}', have an id without a folder" in err
    listed = run("documents")[1]
    assert listed.count(f"notes/{names[1]}") == listed.count(names[1]) == 1
    assert listed.count("yes") == 3


def test_what_is_left_out_is_told(run: Run, notes: Path, model: Path) -> None:
    (notes / "a.doc").write_text("x")
    (notes / "package.json").write_text("{}")
    for command in ("index", "precompute"):
        code, _, err = run(command, notes, "--model", model)
        assert code == 0 and "left out" in err and "1 .doc" in err and "package.json" in err


def test_the_length_of_chunks_is_remembered(
    run: Run, notes: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("index", notes, "--model", model, "--chunk-tokens", 12)
    code, out, _ = run("index", notes)
    assert code == 0 and out.startswith("0 documents indexed") and not caplog.records
    code, out, _ = run("index", notes, "--chunk-tokens", 9)
    assert out.startswith("3 documents indexed")
    assert "chunks have up to 9 tokens from now on, and had up to 12" in caplog.text
    assert run("index", notes)[1].startswith("0 documents indexed")


def test_eval_names_the_folder_or_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["ragcache", "eval", "--report", str(tmp_path / "no" / "x.json")]
    )
    with pytest.raises(ConfigError, match="there is no folder"):
        app(standalone_mode=False)
    with pytest.raises(SourceError, match="Name a file of UTF-8 text"):
        load_dataset(tmp_path / "none.jsonl")


def test_many_files_are_counted_while_they_are_indexed(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "_MANY_FILES", 1)
    monkeypatch.setattr(portions, "_DOCUMENTS", 1)
    monkeypatch.setattr(stages, "EVERY_S", 0.001)
    code, out, err = run("index", notes, "--model", model)
    assert code == 0 and out.startswith("3 documents indexed")
    assert re.search(r"files: [0-3] of 3.*; (index|precompute|look up): ", err)
    assert "if all files are like the first" in err
    assert run("index", notes)[1].startswith("0 documents indexed (0 chunks), 3 unchanged")


def test_an_error_keeps_what_was_indexed_before_it(
    run: Run, notes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portions, "_DOCUMENTS", 1)
    (notes / "zzz.pdf").write_bytes(b"no pdf")
    code, _, err = run("index", notes, "--model", model)
    assert code == 1 and "zzz.pdf" in err
    (notes / "zzz.pdf").unlink()
    assert run("index", notes)[1].startswith("0 documents indexed (0 chunks), 3 unchanged")


def test_guessed_encodings_are_told(run: Run, notes: Path, model: Path) -> None:
    (notes / "old.txt").write_bytes("Ein schöner Tag für die Mühle.".encode("cp1252"))
    code, _, err = run("index", notes, "--model", model)
    assert code == 0
    assert "guessed: the encoding of 1 document, such as notes/old.txt as WINDOWS-1252" in err
