"""KV in the precision that a model was published in, and its stated size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragcache import setup
from ragcache.engine.hf.device import published_dtype, resolve_dtype
from ragcache.errors import ConfigError, ModelError
from ragcache.models import TINY
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from tests import scene
from tests.cli.test_commands import Run, model, notes, run

__all__ = ["model", "notes", "run"]  # fixtures

ON_CPU = {"device": "cpu", "ratio": 0.15, "max_tokens": 3}


@pytest.fixture(autouse=True)
def hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "load_embedder", lambda *_: HashEmbedder())


def opened(path: Path, model: str | Path = TINY, **settings: object) -> RagCache:
    return RagCache.open(path, str(model), Settings(**ON_CPU | settings))  # type: ignore[arg-type]


def codec_of(cache: RagCache) -> str:
    return dict(cache.engine.fingerprint.fields)["codec"]


def test_a_new_store_has_the_models_own(tmp_path: Path) -> None:
    sizes = {}
    for codec in ("", "raw"):
        with opened(tmp_path / f"s{codec}", codec=codec) as cache:
            assert codec_of(cache) == (codec or "bfloat16") and cache.engine.spec.dtype == "float32"
            done = cache.add(scene.DOCUMENTS).precomputed
            sizes[codec] = cache.store.stats().payload_bytes
            assert done.payload_bytes == sizes[codec]
            assert cache.ask("Who keeps a parrot?").report.bytes_loaded > 0
    assert sizes[""] * 2 == sizes["raw"]
    with opened(tmp_path / "s") as cache:  # it remembers
        assert codec_of(cache) == "bfloat16" and cache.add(scene.DOCUMENTS).precomputed.encoded == 0


def test_a_new_store_that_servers_fill_has_it_too(tmp_path: Path) -> None:
    """It is chosen before they are asked, and their dtype decides."""
    for dtype, codec in (("float32", "bfloat16"), ("bfloat16", "raw"), ("auto", None)):
        with pytest.raises(ModelError if codec else ConfigError, match="no vLLM server|the dtype"):
            opened(tmp_path / dtype, engine="vllm", vllm_url="http://127.0.0.1:9", dtype=dtype)
        with DiskStore(tmp_path / dtype) as store:
            assert Catalog(store).get_setting("codec") == codec


@pytest.mark.parametrize("recorded", [True, False])
def test_an_old_store_goes_on_as_it_was(tmp_path: Path, recorded: bool) -> None:
    with opened(tmp_path, codec="raw") as cache:
        cache.add(scene.DOCUMENTS)
        if not recorded:  # by a version that wrote none down
            cache.catalog.drop_setting("codec")
    with opened(tmp_path) as cache:
        assert codec_of(cache) == "raw"
        assert not cache.ask("Who keeps a parrot?").report.fallbacks


@pytest.mark.parametrize(
    ("config", "dtype", "codec"),
    [
        ({"dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"torch_dtype": "float16"}, "auto", "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "float32", "bfloat16"),
        ({"dtype": "float32"}, "auto", "raw"),
        ({"dtype": "bfloat16"}, "bfloat16", "raw"),
        ({"dtype": "float16"}, "bfloat16", "raw"),
        ({"dtype": "float8_e4m3fn"}, "auto", "raw"),
        ({}, "auto", "raw"),
        (None, "auto", "raw"),
    ],
)
def test_which_precision_that_is(
    tmp_path: Path, config: dict[str, object] | None, dtype: str, codec: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Settings.load(device="cpu", dtype=dtype)
    with DiskStore(tmp_path / "store") as store:
        assert setup.resolve_codec(Catalog(store), settings, tmp_path) == codec
    assert (
        resolve_dtype("auto", "cuda") == "bfloat16" and published_dtype(tmp_path / "none") is None
    )


def test_bytes_are_told_before_they_are_there(run: Run, notes: Path, model: Path) -> None:
    code, _, err = run("index", notes, "--model", model)
    assert code == 0 and "tokens will take about" in err
    assert "codec raw; --codec int8 takes 31% of that" in err
    assert "will take" not in run("index", notes)[2]
    (notes / "new.txt").write_text("Another note.")
    _, _, err = run("index", notes)
    assert "will take about" in err and "int8" not in err
    code, out, _ = run("precompute", notes, "--model", model, "--store", "other", "--dry-run")
    assert code == 0 and "--codec int8 takes 31% of that" in out
