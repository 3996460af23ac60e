"""A GGUF file is converted once, to the numbers that transformers loads from it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ModelError
from ragcache.models import gguf, gguf_header, model_path, trusted_names
from ragcache.models.checkpoint import Checkpoint, ModelConfig
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from tests import gguf_files, models

from gguf import GGMLQuantizationType as Kind  # isort: skip  # gguf_files skips without it

TEXT = "Mira Holt plays the cello in Bexley.<eos> 1872  and\nmore"


@pytest.fixture(autouse=True)
def a_new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    gguf_files.write(tmp_path / "small.gguf")
    return tmp_path / "small.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted."""
    converted: list[Path] = []
    convert = gguf.convert_gguf

    def count(file: Path, folder: Path) -> None:
        converted.append(file)
        convert(file, folder)

    monkeypatch.setattr(gguf, "convert_gguf", count)
    return converted


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted, in no time: into files of a few bytes."""
    converted: list[Path] = []

    def write(file: Path, folder: Path) -> None:
        converted.append(file)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(file.read_bytes())
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert_gguf", write)
    return converted


def check_equal(file: Path, folder: Path) -> Any:
    """The model in ``folder`` is the one that transformers loads from the file."""
    expected: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    found: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    assert found.dtype == torch.float32
    theirs, ours = expected.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    ids = torch.randint(3, 380, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(expected(ids).logits, found(ids).logits)
    theirs, ours = (
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name),
        AutoTokenizer.from_pretrained(str(folder)),
    )
    assert theirs(TEXT).input_ids == ours(TEXT).input_ids
    assert theirs.chat_template == ours.chat_template
    assert theirs.special_tokens_map == ours.special_tokens_map
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_numbers_are_those_of_the_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    file = tmp_path / "small.gguf"
    model = gguf_files.write(file, architecture, tie_word_embeddings=tied)
    found = check_equal(file, gguf.converted_folder(file))
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in model.state_dict().items())
    ids = models.tokenizer()(TEXT).input_ids
    assert AutoTokenizer.from_pretrained(str(gguf.converted_folder(file)))(TEXT).input_ids == ids


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.F16, Kind.BF16], ids=lambda k: k.name)
def test_quantised_numbers_are_those_that_transformers_reads(tmp_path: Path, kind: Kind) -> None:
    file = tmp_path / "small.gguf"
    gguf_files.write(file, kind=kind)
    check_equal(file, gguf.converted_folder(file))


def test_an_engine_runs_on_a_file(file: Path, conversions: list[Path]) -> None:
    engine = TransformersEngine.load(file)
    assert (engine.name, engine.spec.dtype) == ("small", "float32")
    assert "[user]" in engine.tokenizer.decode(engine.template.prefix)  # the file's template
    copy = shutil.copy(file, file.with_name("another name.bin"))  # known by its content
    again = TransformersEngine.load(copy)
    assert again.fingerprint == engine.fingerprint and conversions == [file]
    assert ModelConfig.read(file).config["model_type"] == "llama"


def test_nothing_beside_the_file_is_read(file: Path) -> None:
    trap = {"auto_map": {"AutoConfig": "own.C", "AutoTokenizer": ["own.T", None]}}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (file.parent / name).write_text(json.dumps(trap))
    (file.parent / "own.py").write_text("raise SystemExit('code of a model was run')")
    (file.parent / "chat_template.jinja").write_text("{{ wrong }}")
    folder = gguf.converted_folder(file)
    assert "own" not in (folder / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(str(folder)).chat_template == gguf_files.CHAT_TEMPLATE


def test_a_file_is_converted_once(file: Path, written: list[Path]) -> None:
    folder = gguf.converted_folder(file)
    assert gguf.converted_folder(file) == folder and len(written) == 1
    file.unlink()
    gguf_files.write(file, seed=1)
    assert gguf.converted_folder(file) != folder and len(written) == 2


def test_a_file_that_is_replaced_meanwhile_is_not_taken_for_the_first(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while this process waits for another one that converts the same file."""
    gguf_files.write(tmp_path / "other.gguf", seed=1)
    first = gguf._key(file)
    locked = gguf._locked

    def replaced(lock: Path, file: Path) -> Any:
        (tmp_path / "other.gguf").replace(file)
        return locked(lock, file)

    monkeypatch.setattr(gguf, "_locked", replaced)
    with pytest.raises(ModelError, match="small.gguf was changed while it was read: start again"):
        gguf.converted_folder(file)
    monkeypatch.undo()
    assert not list(tmp_path.glob(f"**/{first}"))


def test_a_name_that_is_no_text_is_refused(file: Path) -> None:
    for name in (os.fsdecode(b"caf\xe9.gguf"), os.fsdecode(b"\xff/small.gguf")):
        named = file.parent / name
        named.parent.mkdir(exist_ok=True)
        shutil.copy(file, named)
        with pytest.raises(ModelError, match="the file of the model, .* is not UTF-8"):
            Checkpoint.of(named)


def test_a_name_may_begin_with_a_tilde(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    file.rename("~nobody.gguf")
    assert Checkpoint.of(model_path("~nobody.gguf")).name == "~nobody"
    assert trusted_names.absolute_name("~nobody.gguf") == str(file.parent / "~nobody.gguf")
    monkeypatch.setenv("HOME", str(file.parent))
    assert Checkpoint.of(model_path("~/~nobody.gguf")).name == "~nobody"
    with pytest.raises(ModelError, match="there is no file '~none.gguf'"):
        Checkpoint.of(model_path("~none.gguf"))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def link(folder: Path) -> None:
    truncate(folder)
    folder.symlink_to(folder.rename(folder.with_name("moved")))


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def flip(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        link,
        file_instead,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "content.blake3").unlink(),
        shutil.rmtree,
    ],
)
def test_a_damaged_folder_is_made_again(
    file: Path, written: list[Path], damage: Callable[[Path], object]
) -> None:
    folder = gguf.converted_folder(file)
    before = (folder / "model.safetensors").read_bytes()
    damage(folder)
    assert gguf.converted_folder(file) == folder and len(written) == 2
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_failed_conversion_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_report_unread", fail)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted_folder(file)
    assert [left.suffix for left in (file.parent / "cache/ragcache/gguf").iterdir()] == [".lock"]


def test_threads_convert_one_after_the_other(file: Path, written: list[Path]) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(gguf.converted_folder(file))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(written) == 1


def test_a_store_remembers_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.load(max_tokens=2)
    with RagCache.open(tmp_path / "store", "small.gguf", settings) as cache:
        assert cache.engine.name == "small"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trusted_names.is_trusted(str(file))
    with RagCache.open(tmp_path / "store", settings=settings) as cache:
        assert cache.engine.name == "small"
    with DiskStore(tmp_path / "store", readonly=True) as store:
        assert Catalog(store).get_setting("model") == str(file)


def test_progress_is_logged_where_there_is_no_terminal(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gguf, "_LINE_S", -1)
    gguf.converted_folder(file)
    assert f"converting small.gguf, once, into {file.parent / 'cache'}" in caplog.messages[0]
    assert "converting small.gguf: 0 of 39 tensors" in caplog.messages
    assert "converted small.gguf in " in caplog.messages[-1]


def test_a_terminal_has_a_bar(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    gguf.converted_folder(file)
    assert "converting small.gguf:" in capsys.readouterr().err


def test_nothing_is_shown_where_notes_are_off(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("ragcache")
    logger.setLevel(logging.ERROR)
    try:
        gguf.converted_folder(file)
    finally:
        logger.setLevel(logging.NOTSET)
    assert capfd.readouterr().err == ""


def test_tensors_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add(_: object, tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.extra.weight"] = np.zeros(32, np.float32)

    gguf_files.write(tmp_path / "x.gguf", change=add)
    gguf.converted_folder(tmp_path / "x.gguf")
    assert any("32 of 1" in m and "blk.0.extra.weight" in m for m in caplog.messages)


# Files that are refused.


def lose(_: object, tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def reshape(_: object, tensors: dict[str, np.ndarray]) -> None:
    tensors["output_norm.weight"] = np.zeros(32, np.float32)


def integers(writer: Any, _: object) -> None:
    writer.add_tensor("numbers", np.zeros(32, np.int32))


def rope_factors(_: object, tensors: dict[str, np.ndarray]) -> None:
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)


def other_architecture(writer: Any, _: object) -> None:
    writer.kv_data[0]["general.architecture"].value = "mystery"


def no_tensors(_: object, tensors: dict[str, np.ndarray]) -> None:
    tensors.clear()


def many_layers(writer: Any, _: object) -> None:
    writer.kv_data[0]["llama.block_count"].value = 1 << 31


def large_layers(writer: Any, _: object) -> None:
    writer.kv_data[0]["llama.feed_forward_length"].value = 1 << 31


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor missing": ({"change": lose}, "lacks 1 of the model's tensors.*layers.1.mlp.up_proj"),
    "another shape": ({"change": reshape}, "in another shape, such as model.norm.weight"),
    "unsupported type": ({"change": integers}, "of type I32, such as numbers, which .* dequantise"),
    "llama 3.1": ({"change": rope_factors}, r"scaled RoPE \(rope_freqs.weight\), which trans"),
    "yarn": ({"fields": {"llama.rope.scaling.type": "yarn"}}, r"scaled RoPE \(scaling.type yarn\)"),
    "architecture": ({"change": other_architecture}, "'mystery', which .* It reads .*llama.*qwen2"),
    "many layers": (
        {"change": many_layers},
        "says that it has 2,147,483,648 layers, but it has 39",
    ),
    "large layers": ({"change": large_layers}, "describes 1,649,.* parameters, but its tensors ha"),
    "no tokenizer": ({"tokenizer": False}, "x.gguf has no tokenizer"),
    "vocabulary": ({"change": no_tensors}, "a vocabulary and no tensors"),
    "adapter": ({"fields": {"general.type": "adapter"}}, "no language model but adapter"),
    "projector": ({"fields": {"general.type": "mmproj"}}, "no language model but mmproj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    gguf_files.write(tmp_path / "x.gguf", **options)
    with pytest.raises(ModelError, match=message):
        Checkpoint.of(tmp_path / "x.gguf")
    assert not list(tmp_path.glob("cache/ragcache/gguf/*.part"))


def test_a_truncated_file_is_refused_wherever_it_ends(file: Path) -> None:
    whole = file.read_bytes()
    for size in (4, 10, 30, 1000, 3000, 12000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=f"damaged or truncated: its {size:,} bytes"):
            Checkpoint.of(file)


def test_what_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>Not found</html>")
    with pytest.raises(ModelError, match="x.gguf is not a GGUF file: it begins with b'<htm'"):
        Checkpoint.of(tmp_path / "x.gguf")


def test_an_unknown_type_of_tensors_is_named(file: Path) -> None:
    data = file.read_bytes()
    where = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    file.write_bytes(data[:where] + (200).to_bytes(4, "little") + data[where + 4 :])
    with pytest.raises(ModelError, match="type that the package gguf does not know.*200"):
        Checkpoint.of(file)


def test_a_part_of_a_split_file_is_refused(file: Path) -> None:
    part = file.rename(file.with_name("big-00002-of-00003.gguf"))
    with pytest.raises(ModelError, match="llama-gguf-split --merge big-00001-of-00003.gguf"):
        Checkpoint.of(part)
    gguf_files.write(file, change=lambda writer, _: writer.add_uint16("split.count", 2))
    with pytest.raises(ModelError, match="is one part of a split GGUF file"):
        Checkpoint.of(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 500.0}, "RoPE's base is 10000, which .* it takes 500.0. Use the same"),
        ({}, "RoPE's base is 10000, which .* it takes None. Use the same"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(
    file: Path, change: dict[str, float], message: str
) -> None:
    header = gguf_header.GgufHeader.read(file)
    header.check_config({"text_config": {"rope_parameters": {"rope_theta": 10000.0}}}, 1)
    with pytest.raises(ModelError, match=message):
        header.check_config({"rope_parameters": change}, 1)


def test_what_transformers_does_not_load_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("a part of it\nis unknown")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="cannot load the model of .*: a part of it is unknown. U"):
        Checkpoint.of(file)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exhaust)
    with pytest.raises(ModelError, match="the model of small.gguf does not fit this machine's mem"):
        Checkpoint.of(file)


def exhaust(*_: object, **__: object) -> None:
    raise MemoryError


def test_room_is_checked_before_it_is_needed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"parameters, and converting it takes 0.3 GB in .*gguf, "):
        Checkpoint.of(file)
    assert not list(file.parent.glob("cache/ragcache/gguf/*.part"))


def test_a_cache_that_cannot_be_written_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder: root may write to any
    with pytest.raises(
        ModelError, match="small.gguf cannot be converted into .*Not a dir.*set XDG"
    ):
        Checkpoint.of(file)


def test_a_disk_that_fills_up_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def save_pretrained(self, _: str) -> None:
            raise RuntimeError("No space left on device (os error 28)")

    monkeypatch.setattr(gguf, "_plain", lambda _: Full())
    with pytest.raises(ModelError, match=r"cannot be converted into .* \(No space left on device"):
        Checkpoint.of(file)


def test_the_extra_is_named_where_it_is_missing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf.converted_folder(file)
    monkeypatch.setattr(gguf_header, "find_spec", lambda name: None if name == "gguf" else 1)
    assert gguf.converted_folder(file) == folder  # a converted one needs no packages
    shutil.rmtree(folder)
    with pytest.raises(
        ModelError, match=r'gguf cannot be imported.*install "ragcache-fusion\[gguf'
    ):
        gguf.converted_folder(file)


def test_a_file_that_may_not_be_read_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ModelError, match=r"small.gguf cannot be read \(Permission denied\): make it"
    ):
        gguf.converted_folder(file)
