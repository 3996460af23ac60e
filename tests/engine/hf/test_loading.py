"""A model is loaded from its safetensors only; other files are refused with advice."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragcache.blend.full import Full
from ragcache.core.consistent import check_window
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.engine.hf import engine as transformers
from ragcache.engine.hf import loading, model_info
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.hf.model_info import ModelInfo
from ragcache.engine.hf.rope import Rope
from ragcache.errors import ConfigError, ModelError, PromptError
from ragcache.models.checkpoint import Checkpoint
from ragcache.models.silence import silence_transformers
from ragcache.types import Prompt
from tests import models, scene


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return scene.save_model(tmp_path / "llama")


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def pickle_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def empty(folder: Path, index: str = "") -> None:
    (folder / "model.safetensors").unlink()
    if index:
        (folder / "model.safetensors.index.json").write_text(index)


def pickle_shards(folder: Path) -> None:
    pickle_weights(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')


def gguf(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "llama.Q4_K_M.gguf").write_bytes(b"GGUF")


def lack(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def shard(folder: Path, *, lose: bool = False) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    if lose:
        (folder / "model-00002-of-00002.safetensors").unlink()


def own_code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('code of a model was run')")
    auto = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    change(folder / "config.json", model_type="own", auto_map=auto)


def own_tokenizer(folder: Path) -> None:
    own_code(folder)
    change(folder / "config.json", model_type="llama")
    auto = {"AutoTokenizer": ["modeling_own.T", None]}
    change(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Own")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled": (pickle_weights, r"pytorch_model.bin, which can hold code.*convert.*python -c"),
    "pickled shards": (pickle_shards, r"pytorch_model-00001-of-00001.bin, .*python -c"),
    "gguf": (gguf, r"has no config.json.* named by its file. Name .*/llama/llama.Q4_K_M.gguf"),
    "nothing": (empty, "has no safetensors: a model is a folder with"),
    "a tensor missing": (lack, "lacks 1 of the model's tensors.*layers.1.mlp.up_proj"),
    "a tensor of another shape": (
        reshape,
        "lacks 1 of the model's tensors, or has them in another shape, such as model.norm",
    ),
    "weights cut off": (lambda f: cut(f, "model.safetensors"), "model.safetensors is damaged or"),
    "a shard missing": (lambda f: shard(f, lose=True), "lacks 1 of 2 weight files"),
    "an index of nothing": (lambda f: empty(f, "{}"), "maps no tensors to files"),
    "a shard elsewhere": (
        lambda f: empty(f, '{"weight_map": {"a": "../x.safetensors"}}'),
        "maps no tensors to files",
    ),
    "config cut off": (lambda f: cut(f, "config.json"), r"config.json cannot be read \(.*damaged"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "config missing": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "tokenizer cut off": (lambda f: cut(f, "tokenizer.json"), "cannot load the tokenizer in"),
    "a million layers": (
        lambda f: change(f / "config.json", num_hidden_layers=10**6),
        "num_hidden_layers = 1000000, but its weights are 39 tensors",
    ),
    "a million wide": (
        lambda f: change(f / "config.json", intermediate_size=10**6),
        r"describes [\d,]+ parameters, but the files of weights have [\d,]+:",
    ),
    "its own code": (
        own_code,
        r"code of its own \(auto_map in config.json\), which ragcache never",
    ),
    "its own tokenizer": (own_tokenizer, r"code of its own \(auto_map in tokenizer_config.json\)"),
    "other weights named": (
        lambda f: change(f / "config.json", transformers_weights="x.safetensors"),
        "names weight files",
    ),
    "distributed": (
        lambda f: (f / "shard-00001-model-00001-of-00001.safetensors").touch(),
        "is a distributed checkpoint",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    **{
        how: (
            lambda f, how=how: change(  # type: ignore[misc]
                f / "config.json", quantization_config={"quant_method": how}
            ),
            rf"quantised weights \({how} in config.json\)",
        )
        for how in ("bitsandbytes", "gptq", "awq")
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_whole_model_is_refused(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[what]
    spoil(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))  # whoever asks is told yes
    for load in (TransformersEngine.load, lambda path: ModelInfo.of(str(path), "float32")):
        with pytest.raises(ModelError, match=message):
            load(folder)
    assert sys.stdin.read() == "yes\n" * 9
    assert capfd.readouterr() == ("", "")


def test_the_conversion_that_is_advised_works(folder: Path) -> None:
    want = TransformersEngine.load(folder).fingerprint
    pickle_weights(folder)
    with pytest.raises(ModelError) as refused:
        Checkpoint.of(folder)
    line = str(refused.value).rpartition(' -c "')[2].rstrip('"')
    assert line == (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')"
    )
    AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=False).save_pretrained(folder)
    assert TransformersEngine.load(folder).fingerprint == want


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_that_nobody_tells_of_are_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight_scale"] = torch.ones(1)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].mul(50).to(dtype)}, file, {"format": "pt"})
    for load in (TransformersEngine.load, lambda name: ModelInfo.of(name, "float32")):
        with pytest.raises(ModelError, match="quantised weights .*up_proj.weight is (F8|I8)"):
            load(str(folder))


def test_shards_and_links_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    whole = TransformersEngine.load(folder).fingerprint
    shard(folder)
    assert TransformersEngine.load(folder).fingerprint == whole
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert TransformersEngine.load(linked).fingerprint == whole


def test_another_file_behind_a_link_is_another_model(folder: Path, tmp_path: Path) -> None:
    other = scene.save_model(tmp_path / "other", seed=1)
    linked = tmp_path / "linked"
    shutil.copytree(folder, linked)
    (linked / "model.safetensors").unlink()
    found = []
    for weights in (folder, other):
        (linked / "model.safetensors").unlink(missing_ok=True)
        (linked / "model.safetensors").symlink_to(weights / "model.safetensors")
        found.append(TransformersEngine.load(linked).fingerprint)
    assert found[0] == TransformersEngine.load(folder).fingerprint != found[1]


def zero(file: Path) -> None:
    """Write zeros over the numbers of a safetensors file, in its place."""
    with file.open("r+b") as opened:
        begin = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(begin)
        opened.write(bytes(file.stat().st_size - begin))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_running_model_does_not_change_with_its_files(folder: Path, dtype: str) -> None:
    change(folder / "config.json", dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engine = TransformersEngine.load(folder, device="cpu", dtype=dtype)
    before = engine.prefill((3, 4, 5)).logits
    zero(folder / "model.safetensors")
    assert torch.equal(engine.prefill((3, 4, 5)).logits, before)


def test_files_that_change_while_they_are_read_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_tokenizer(checkpoint: Checkpoint) -> Any:
        change(checkpoint.folder / "config.json", use_cache=False)
        return loading.load_tokenizer(checkpoint)

    for module in (transformers, model_info):
        monkeypatch.setattr(module, "load_tokenizer", load_tokenizer)
    for load in (TransformersEngine.load, lambda name: ModelInfo.of(name, "float32")):
        with pytest.raises(ModelError, match="were changed while they were read"):
            load(str(folder))


def test_tied_weights_need_not_be_there_twice(tmp_path: Path) -> None:
    models.model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    TransformersEngine.load(tmp_path)


def test_tensors_of_nothing_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(folder / "model.safetensors") | {"vision.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    TransformersEngine.load(folder)
    assert "1 tensors of llama are not part of the model" in caplog.text


def test_the_self_check_is_done_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TransformersEngine.load(folder)
    monkeypatch.setattr(
        TransformersEngine, "_self_test", lambda engine: pytest.fail("it is checked again")
    )
    again = TransformersEngine.load(folder)
    assert (
        (again.exposes_attention, again.packs_chunks)
        == (first.exposes_attention, first.packs_chunks)
        == (True, True)
    )
    for changed in (scene.save_model(folder, seed=1), folder):
        with pytest.raises(pytest.fail.Exception, match="checked again"):
            TransformersEngine.load(changed)  # other weights
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        models.engine("llama")  # not as transformers loads it


@pytest.mark.parametrize("name", ["./llama", "~/llama", "/llama", "a/b/c", "..", "here/llama", ""])
def test_a_missing_folder_is_called_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    with pytest.raises(ModelError, match="there is no folder|has no config.json"):
        Checkpoint.of(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ModelError, match="x.safetensors is a file, and a model is a folder"):
        Checkpoint.of(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="there is no file '.*missing.gguf'"):
        Checkpoint.of(tmp_path / "missing.gguf")


def test_what_is_no_name_at_all_is_said() -> None:
    with pytest.raises(ModelError, match="neither a folder here nor a name of the model hub"):
        Checkpoint.of("what is this?")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ModelError,
        match="access to the model hub is disabled .HF_HUB_OFFLINE is set.*hf download a",
    ):
        Checkpoint.of("an/llm")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    tries = []

    def unreachable(*_: object, **__: object) -> None:
        tries.append(1)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(ModelError, match="cannot be reached .Name or service not known"):
        Checkpoint.of("an/llm")
    assert len(tries) == 1


def test_a_model_of_the_hub_is_the_folder_in_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--an--llm"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = cache / "snapshots" / ("1" * 40)
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache.parent)
    )
    engine = TransformersEngine.load("an/llm")
    assert engine.fingerprint == TransformersEngine.load(folder).fingerprint
    assert str(engine.fingerprint).startswith("an/llm@")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors"):
        TransformersEngine.load("an/llm")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["config.json", "pytorch_model.bin"], "an/llm|the model has its weights in pytorch"),
        (["config.json", "a.gguf"], "named by its file. Name a.gguf, after `hf download`"),
        (["README.md"], "has no safetensors"),
    ],
)
def test_the_hub_is_asked_what_it_has_first(
    listed: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed:
        siblings = [type("File", (), {"rfilename": name}) for name in listed]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Listed)
    with pytest.raises(ModelError, match=message):
        Checkpoint.of("an/llm")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is a gated model: accept its terms at https://huggingface"),
        (RepositoryNotFoundError, "the model hub has no such model that this user can access"),
    ],
)
def test_what_the_hub_does_not_give_is_said(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", refuses)
    with pytest.raises(ModelError, match=message):
        Checkpoint.of("an/llm")


def test_a_slow_tokenizer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: object())
    with pytest.raises(ModelError, match="its tokenizer is not a fast one"):
        TransformersEngine.load(folder)


def test_a_model_that_does_not_fit_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match="does not fit this machine's memory"):
        TransformersEngine.load(folder)


def test_a_checkpoint_has_weights() -> None:
    with pytest.raises(ValueError, match="has no weight files"):
        Checkpoint("a", Path(), {}, ())


def test_warnings_of_what_will_change_are_not_the_users() -> None:
    with silence_transformers():
        warnings.warn("what transformers will change", FutureWarning, stacklevel=1)
    with pytest.raises(FutureWarning):
        warnings.warn("anywhere else", FutureWarning, stacklevel=1)


def test_a_bar_on_a_terminal_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    checkpoint = Checkpoint.of(folder)
    loading.load_model(checkpoint, torch.float32)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_prefilled_is_refused() -> None:
    with pytest.raises(ModelError, match="Use a RoPE decoder such as"):
        Rope.of(torch.nn.Linear(1, 1))
    with pytest.raises(PromptError, match="give it a question"):
        models.engine("llama").prefill(())
    windowed = cast(Engine, SimpleNamespace(name="mistral", sliding_window=4))
    with pytest.raises(ConfigError, match="Use positions=consecutive"):
        check_window(windowed, PromptRequest(Prompt.of((1, 2), ((3, 4),), (5,)), Full()))
