"""Only models that the user has named are loaded: a store alone cannot choose one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ragcache.errors import ConfigError, ModelError
from ragcache.models import trusted_names
from ragcache.models.checkpoint import Checkpoint
from ragcache.models.file_cache import cached_text, content_digest, file_identity
from ragcache.rag import RagCache
from ragcache.retriever import embedder_files
from ragcache.retriever.embed import SentenceTransformerEmbedder
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from tests import scene


@pytest.fixture(autouse=True)
def a_new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return scene.save_model(tmp_path / "llama")


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A folder with the packaged embedding model."""
    return shutil.copytree(
        embedder_files.model_folder(embedder_files.PACKAGED),
        tmp_path / "minilm",
        copy_function=link,
    )


def link(source: str, target: str) -> str:
    Path(target).symlink_to(source)
    return target


def forget() -> None:
    (trusted_names._file()).unlink()


def exchange(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_stores_model_is_loaded_once_it_was_named(tmp_path: Path, model: Path) -> None:
    with RagCache.open(tmp_path / "store", str(model)):
        pass
    with RagCache.open(tmp_path / "store") as cache:  # the same user, the same machine
        assert cache.engine.name == "llama"
    forget()
    with pytest.raises(ConfigError, match=f"built with the model '{model}'.*--model {model}, RAG"):
        RagCache.open(tmp_path / "store")
    told: list[str] = []
    with RagCache.open(
        tmp_path / "store", settings=Settings.load(model=str(model)), loading=told.append
    ):
        assert told == [str(model)]
    with RagCache.open(tmp_path / "store"):
        pass


def test_a_name_means_the_same_everywhere(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    with RagCache.open(tmp_path / "store", "llama"):
        pass
    monkeypatch.chdir("/")
    with RagCache.open(tmp_path / "store") as cache:
        assert cache.catalog.get_setting("model") == str(model)


def test_without_a_place_to_remember_it_is_named_every_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        with RagCache.open(tmp_path / "store", str(model)) as cache:
            beside = RagCache.open(tmp_path / "tenant", beside=cache)  # shares what was loaded
            beside.close()
    with pytest.raises(ConfigError, match="name it once"):
        RagCache.open(tmp_path / "store")


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is no home
    trusted_names.remember_name("an/llm")
    assert (
        not trusted_names.is_trusted("an/llm")
        and cached_text("check", ["a"], lambda: "found") == "found"
    )


def test_a_path_that_cannot_be_looked_up_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"aaa' cannot be read \(File name too long\): make it"):
        Checkpoint.of(str(tmp_path / ("a" * 300)))
    assert trusted_names.absolute_name("a" * 300) == "a" * 300
    stat = Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if self.name == "m.gguf":
            raise PermissionError(13, "Permission denied")
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)  # as in a folder of another user
    with pytest.raises(ModelError, match=r"m.gguf' cannot be read \(Permission denied\): make it"):
        Checkpoint.of(str(tmp_path / "m.gguf"))


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    trusted_names.remember_name("an/llm")
    with trusted_names._file().open("a") as file:
        file.write('"half\n5\n')
    assert trusted_names.is_trusted("an/llm") and not trusted_names.is_trusted("half")
    before = trusted_names._file().read_text()
    trusted_names.remember_name("an/llm")
    assert trusted_names._file().read_text() == before


def test_an_exchanged_embedder_is_refused_and_a_moved_one_is_not(
    tmp_path: Path, embedder: Path
) -> None:
    given = Settings.load(embedder=str(embedder))
    with RagCache.open(tmp_path / "store", settings=given) as cache:
        cache.add(scene.DOCUMENTS)
    moved = embedder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="was embedded with .*RAGCACHE_EMBEDDER"):
        RagCache.open(tmp_path / "store")
    with RagCache.open(tmp_path / "store", settings=Settings.load(embedder=str(moved))) as cache:
        assert cache.add(scene.DOCUMENTS).unchanged == 3
    with RagCache.open(tmp_path / "store") as cache:  # where it lies now
        assert cache.catalog.get_setting("embedder") == str(moved)
        assert cache.add(scene.DOCUMENTS).unchanged == 3
        tenant = RagCache.open(tmp_path / "tenant", beside=cache)
        tenant.close()
    exchange(moved, lambda weights: weights["embeddings.word_embeddings.weight"].neg_())
    with pytest.raises(ConfigError, match="embedded with .*moved' before its files changed"):
        RagCache.open(tmp_path / "store")
    with (
        RagCache.open(tmp_path / "other", settings=Settings.load(embedder=str(moved))) as other,
        pytest.raises(ConfigError, match="cannot be compared"),
    ):
        RagCache.open(tmp_path / "tenant", beside=other)
    forget()
    with pytest.raises(ConfigError, match="embedded with .* you have not named.*RAGCACHE_EMBEDDER"):
        RagCache.open(tmp_path / "store")


def test_a_store_without_a_digest_is_given_one(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        Catalog(store).put_setting("embedder", embedder_files.PACKAGED)  # as earlier releases did
    with RagCache.open(tmp_path / "store") as cache:
        digest = embedder_files.model_digest(embedder_files.model_folder(embedder_files.PACKAGED))
        assert cache.catalog.get_setting("embedder_digest") == digest


def test_an_embedder_is_its_safetensors(embedder: Path) -> None:
    whole = SentenceTransformerEmbedder(str(embedder), "cpu")
    assert whole.digest == SentenceTransformerEmbedder(device="cpu").digest
    weights = (embedder / "model.safetensors").resolve()
    exchange(embedder, lambda weights: weights.pop("encoder.layer.0.output.dense.weight"))
    with pytest.raises(ModelError, match="lacks 1 of its tensors, encoder.layer.0.output.dense"):
        SentenceTransformerEmbedder(str(embedder), "cpu")
    exchange(embedder, dict.clear)
    torch.save(load_file(weights), embedder / "pytorch_model.bin")
    (embedder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pytorch_model.bin, which can hold code.*python -c"):
        SentenceTransformerEmbedder(str(embedder), "cpu")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ('[{"type": "os.system", "path": ""}]', "contains code of its own .os.system in modules"),
        ("[", "modules.json cannot be read"),
        ("{}", "is not a list of modules"),
    ],
)
def test_an_embedders_own_code_is_not_run(embedder: Path, modules: str, message: str) -> None:
    (embedder / "modules.json").unlink()
    (embedder / "modules.json").write_text(modules)
    with pytest.raises(ModelError, match=message):
        SentenceTransformerEmbedder(str(embedder), "cpu")


def test_nothing_is_known_by_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no files are given"):
        file_identity([])
    with pytest.raises(ValueError, match="part of the identity of this check is empty"):
        cached_text("check", [], lambda: "found")
    with pytest.raises(ValueError, match="part of the identity of this check is empty"):
        cached_text("check", ["a", ""], lambda: "found")
    with pytest.raises(ValueError, match="no files are given"):
        content_digest(tmp_path, [])
