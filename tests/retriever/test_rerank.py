"""A cross-encoder's scores are those of transformers, and what cannot rank is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from ragcache.errors import ConfigError, ModelError
from ragcache.retriever.embedder_files import PACKAGED, model_folder
from ragcache.retriever.rerank import CrossEncoderReranker
from tests.cross_encoder import make_cross_encoder

TEXTS = ["the river rose", "boat of apples", "the old mill is gone", "where is the ferryman ?"]
QUESTION = "where is the boat ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cross_encoder(tmp_path_factory.mktemp("models") / "ranks")


def test_scores_are_those_of_transformers(folder: Path) -> None:
    reranker = CrossEncoderReranker(str(folder), device="cpu", batch_size=2)
    model = BertForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        expected = [
            float(model(**tokenizer(QUESTION, text, return_tensors="pt")).logits.sigmoid())
            for text in TEXTS
        ]
    scores = reranker.scores(QUESTION, TEXTS)
    assert scores.dtype == np.float32 and len(set(expected)) == len(TEXTS)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_array_equal(reranker.scores(QUESTION, TEXTS), scores)
    assert reranker.scores(QUESTION, []).shape == (0,)
    assert np.isfinite(reranker.scores("\ud800", ["\udfff apples"])).all()


def test_pairs_that_are_cut_are_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reranker = CrossEncoderReranker(str(folder), device="cpu")
    with caplog.at_level(logging.WARNING, "ragcache.retriever.rerank"):
        reranker.scores("boat", ["apples " * 28])  # and three tokens of the model's own
        assert caplog.messages == []
        reranker.scores("boat", ["apples", "apples " * 29])
        reranker.scores("boat", ["apples " * 99])
    (said,) = caplog.messages
    assert said.startswith("1 of 2 chunks are, with the question, longer than the 32 tokens")


def test_what_cannot_rank_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gives each pair 3 scores: it tells classes apart"):
        CrossEncoderReranker(str(make_cross_encoder(tmp_path / "classes", labels=3)))
    with pytest.raises(ModelError, match=r"lacks \d+ of its tensors, .*classifier"):
        CrossEncoderReranker(str(model_folder(PACKAGED)))  # it has no head
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty is no cross-encoder: it has neither"):
        CrossEncoderReranker(str(tmp_path / "empty"))
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="import CrossEncoder"):
        CrossEncoderReranker(str(tmp_path / "pickled"))
    with pytest.raises(ModelError, match="no/such-ranker is not on this machine"):
        CrossEncoderReranker("no/such-ranker")
    with pytest.raises(ModelError, match="cannot be loaded: .* use a folder"):
        CrossEncoderReranker(str(folder), device="toaster")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        CrossEncoderReranker(str(folder), batch_size=0)
    broken = CrossEncoderReranker(str(make_cross_encoder(tmp_path / "broken", scale=float("nan"))))
    with pytest.raises(ModelError, match="gave a score that is not finite"):
        broken.scores(QUESTION, TEXTS)
