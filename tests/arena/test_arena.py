"""The driver of examples/arena, run as the board runs a method, against RagCache's own answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ragcache.blend import blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute
from ragcache.core.request import PromptRequest
from ragcache.engine.chat_message import ChatMessage
from ragcache.errors import ConfigError, PromptError
from ragcache.models import TINY
from ragcache.planning.context import EncodingContext
from ragcache.store.memory import MemoryStore
from ragcache.types import Sampling
from tests.arena import board

SAMPLES = [
    {
        "_id": "1",
        "input": "What does Corvex Mills make?",
        "chunks": ["Corvex Mills makes clocks.\n\n", "Mira Holt lives in Oslo.\n\n"],
        "answers": ["clocks"],
        "context": "not read",
    },
    {
        "_id": "2",
        "input": "Where does Mira Holt live?",
        "chunks": [
            "Dana Reyes lives in Bexley.\n\n",
            "Mira Holt lives in Oslo.\n\n",
            "She sings.\n\n",
        ],
        "answers": ["Oslo"],
    },
]
CONFIG: dict[str, Any] = {"exam": board.EXAM, "mode": "fused", "ratio": 0.2}


@pytest.fixture(scope="module")
def arena(tiny_model_dir: Path) -> Iterator[Any]:
    """The example, with the stand-in in place of the board's package."""
    names = "kvsharearena", "kvsharearena.harness", "kvsharearena.scoring"
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, board)
        for name in ("examples.arena.driver", "examples.arena.__main__"):
            patch.delitem(sys.modules, name, raising=False)
        yield import_module("examples.arena.__main__")
        for name in ("examples.arena.driver", "examples.arena.__main__"):
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def driver(arena: object) -> Any:
    return sys.modules["examples.arena.driver"]


def prepared(driver: Any, **changed: Any) -> Any:
    method = driver.RagCacheRepair()
    method.setup(TINY, CONFIG | changed)
    return method


@pytest.mark.parametrize("mode", ["fused", "reuse", "full"])
def test_answers_are_those_of_a_generator_over_the_same_store(driver: Any, mode: str) -> None:
    ratio = 0.2 if mode == "fused" else None
    method, sharing = prepared(driver, mode=mode, ratio=ratio), driver.RagCacheSharing()
    sharing.prepare(TINY, TINY, CONFIG | {"mode": mode, "ratio": ratio})
    sample = SAMPLES[1]
    prompt = method.prompt(sample["input"], sample["chunks"])
    engine, store, encoding = method.engine, MemoryStore(), method.encoding
    precompute(engine, store, [encoding.key(engine.fingerprint, ids) for ids in prompt.chunks])
    request = PromptRequest(prompt, blender(mode, ratio), Sampling(max_tokens=4))
    generator = LocalGenerator(engine, store, encoding, store_misses=False)
    wanted = generator.stream(request).answer

    result = method.answer(sample["input"], [*map(method.build_cache, sample["chunks"])], CONFIG)
    shared = sharing.run(sample)
    report, layers = wanted.report, engine.spec.layers
    assert result.text == shared.output == wanted.text
    computed = sum(report.computed[slice(*_span(prompt))])
    assert result.recomputed_layer_tokens == computed + (mode == "fused") * report.probe_rows
    assert result.dense_payload_layer_tokens == report.chunk_tokens * layers
    assert result.kv_bytes == engine.spec.chunk_bytes(report.chunk_tokens)
    assert result.aux["bytes_loaded"] == report.bytes_loaded and result.ttft_ms > 0
    assert result.aux["fallbacks"] == [] and result.aux["peak_rss_mb"] > 100
    assert shared.reuse_rate == report.cached_tokens / len(prompt)
    assert (shared.input_tokens, shared.gen_tokens) == (len(prompt), len(wanted.tokens))
    reuses = mode != "full"
    assert (shared.reuse_rate > 0, shared.aux["bytes_loaded"] > 0) == (reuses, reuses)
    assert (result.recomputed_layer_tokens == result.dense_payload_layer_tokens) != reuses


def _span(prompt: Any) -> tuple[int, int]:
    return prompt.spans[0][0], prompt.spans[-1][1]


def test_the_prompt_is_the_boards_with_sources_tokenised_alone(driver: Any) -> None:
    method = prepared(driver)
    engine, exam, question = method.engine, board.EXAM, str(SAMPLES[0]["input"])
    chunks = [str(chunk) for chunk in SAMPLES[0]["chunks"]]
    content = f"{exam['pre_ctx']}{''.join(chunks)}{exam['mid_q']}{question}{exam['tail']}"
    messages = [
        ChatMessage.of("system", str(exam["system_prompt"])),
        ChatMessage.of("user", content),
    ]
    prompt = method.prompt(question, chunks)
    rendered = engine.chat_template().render(messages).text
    shown = "".join(engine.pieces(prompt.tokens))  # this tokenizer begins every part with a space
    assert shown.replace(" ", "") == rendered.replace(" ", "")
    assert list(prompt.chunks) == [engine.tokenize(chunk) for chunk in chunks]
    assert method.encoding.context[: len(prompt.prefix)] == prompt.prefix
    without = prepared(driver, mode="none", ratio=None).prompt(question, chunks)
    assert without.tokens == prompt.prefix + prompt.question and not without.chunks


def test_a_model_that_can_think_answers_at_once(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = (
        "{%- for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{%- if add_generation_prompt %}[assistant] "
        "{%- if enable_thinking is defined and not enable_thinking %}<none>{% endif %}{% endif %}"
    )
    engine = prepared(driver).engine
    monkeypatch.setattr(engine.tokenizer, "chat_template", thinking)
    prompt = prepared(driver).prompt("Who?", ["Mira."])
    assert "".join(engine.pieces(prompt.tokens)).endswith("[assistant]<none>")


def test_the_command(
    arena: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "world_n100.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)))
    out = tmp_path / "results"
    command = [f"--model={TINY}", "--subset=world", f"--data={tmp_path}", f"--out={out}"]
    command += ["--ratio=0.2", "--questions=2"]
    arena.main(command)
    shown = capsys.readouterr().out
    cells = [line.split("\t") for line in shown.splitlines()]
    assert cells[0] == list(arena.HEADS)
    assert [row[0] for row in cells[1:]] == ["ragcache_none", "ragcache_full", "ragcache_fused_0.2"]
    assert [row[5:7] for row in cells[1:3]] == [["0.0%", "0.0 MB"]] * 2
    assert cells[1][1:4] == ["0.000", "0.000", "-"]
    assert cells[2][1:5] == ["1.000", "1.000", "0.0%", "0.0%"]
    assert cells[3][1:3] == ["1.000", "1.000"]
    positive = [cells[3][3], *cells[3][5:]]  # as in 85.1% and 1,067 MB
    assert all(float(re.sub(r"[^\d.]", "", cell)) > 0 for cell in positive)
    saved = json.loads((out / "ragcache_fused_0.2_world.json").read_text())
    assert saved["method_card"]["provenance"] == "official"
    assert saved["summary"]["method"] == "ragcache_fused_0.2"

    with pytest.raises(ConfigError, match="unknown"):
        arena.main([*command, "--mode=fusde"])
    monkeypatch.setattr(arena, "run", None)  # all results are there: nothing is run again
    arena.main(command)
    assert capsys.readouterr().out == shown
    with pytest.raises(ConfigError, match="is of tiny and 2 questions: name another folder"):
        arena.main([*command, "--questions=1"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ratoi": 0.1}, "ratoi"),
        ({"ratio": "much"}, "ratio"),
        ({"ratio": 2.0}, "ratio"),
        ({"mode": "fusde"}, "mode 'fusde' is unknown"),
        ({"mode": "full"}, "takes a ratio"),
        ({"mode": "cachecraft", "ratio": None}, "gives every source alone: use another mode"),
        ({"exam": {"pre_ctx": ""}}, "exam.system_prompt"),
        ({"encoding_context": "poetry"}, "'poetry' is unknown"),
    ],
)
def test_wrong_configs(driver: Any, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepared(driver, **changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chunks": []}, "at least 1 item"),
        ({"chunks": ["text", " "]}, "chunks.1"),
        ({"chunks": "text"}, "chunks"),
        ({"input": "\n"}, "input"),
        ({"input": None}, "input"),
    ],
)
def test_wrong_samples(driver: Any, changed: dict[str, Any], said: str) -> None:
    sharing = driver.RagCacheSharing()
    sharing.prepare(TINY, TINY, CONFIG)
    with pytest.raises(ValueError, match=said):
        sharing.run(SAMPLES[0] | changed)
    with pytest.raises(ValueError, match="chunks\n  Field required"):
        sharing.run({"input": "Who?"})


def test_kv_of_another_model_or_context(driver: Any) -> None:
    with pytest.raises(ConfigError, match="a model cannot use the KV of another"):
        driver.RagCacheSharing().prepare("a/producer", TINY, CONFIG)
    method = prepared(driver)
    source = method.build_cache("Mira Holt lives in Oslo.")
    method.encoding = EncodingContext("bos", method.encoding.context[:1])
    with pytest.raises(ConfigError, match="mode prose: build it with .*, mode bos"):
        method.reply("Who?", [source])
    with pytest.raises(PromptError, match="no sources to answer from"):
        method.reply("Who?", [])
    with pytest.raises(PromptError, match="a source is empty"):
        method.build_cache(" ")


def test_without_the_boards_package(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvsharearena", None)
    monkeypatch.delitem(sys.modules, "examples.arena.driver")
    with pytest.raises(ImportError, match="Clone github.com/xishi404/KVShareArena"):
        import_module("examples.arena.driver")
