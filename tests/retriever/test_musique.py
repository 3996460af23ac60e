"""A real corpus, read, embedded and searched: the passages of CacheBlend's MuSiQue sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ragcache.retriever.embed import SentenceTransformerEmbedder
from ragcache.retriever.faiss_index import FaissIndex
from ragcache.retriever.index import NumpyIndex
from ragcache.retriever.source import read

DATA = Path(__file__).parents[3] / "shared" / "data" / "musique_s.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason="the MuSiQue sample is not here"),
]


def test_faiss_equals_numpy_on_musique(carried: SentenceTransformerEmbedder) -> None:
    documents = list(read([DATA]))
    assert len(documents) == 1255
    calls: list[tuple[int, int]] = []
    vectors = carried.embed(
        [d.text for d in documents], progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(min(32 * n, 1255), 1255) for n in range(1, 41)]
    plain, fast = NumpyIndex(carried.dimension), FaissIndex(carried.dimension)
    for index in (plain, fast):
        index.add(np.arange(1255), vectors)
    entries = json.loads(DATA.read_text())
    questions = carried.embed([entry["question"] for entry in entries])
    (scores, ids), (other_scores, other_ids) = (
        plain.search(questions, 10),
        fast.search(questions, 10),
    )
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_array_equal(scores, other_scores)
    # Each question's own ten passages are among 1,255: ten at random would find 1 % of them.
    place = {d.text: row for row, d in enumerate(documents)}
    own = [{place[c["text"].strip()] for c in entry["ctxs"]} for entry in entries]
    found = [len(own[q] & set(ids[q].tolist())) / len(own[q]) for q in range(len(entries))]
    assert np.mean(found) > 0.2
