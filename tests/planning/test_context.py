"""What chunks are computed after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import DEFAULT_CONTEXT, PROSE_TOKENS, encoding_context
from ragcache.planning.prose import PROSE
from ragcache.types import ChunkKV, Document
from tests import models, scene


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", max_position_embeddings=4096)


def test_prose_follows_the_prefix(engine: TransformersEngine) -> None:
    how, prefix = encoding_context("prose", engine), engine.template.prefix
    assert how.context[: len(prefix)] == prefix
    assert len(how.context) == len(prefix) + PROSE_TOKENS
    text = "".join(engine.pieces(how.context[len(prefix) :]))
    assert text.split()[:2] == PROSE[0].split()
    key = how.key(engine.fingerprint, (5, 6, 7))
    assert (key.mode, key.context) == (DEFAULT_CONTEXT, how.context)


def test_a_short_context_is_mostly_left_to_chunks() -> None:
    engine = models.engine("llama", max_position_embeddings=512)
    how = encoding_context("prose", engine)
    assert len(how.context) == len(engine.template.prefix) + 512 // 4


def test_a_long_chunk_has_as_much_of_it_before_as_fits(engine: TransformersEngine) -> None:
    how, least = encoding_context("prose", engine), len(engine.template.prefix)
    most = engine.context_tokens
    for tokens in (1, most - len(how.context), most - least - 1, most - least, most):
        before = how.before((7,) * tokens)
        assert before == how.context[: len(before)]
        assert len(before) == min(len(how.context), max(least, most - tokens))
    [kv] = engine.encode([(7,) * (most - least)], context=how.before((7,) * (most - least)))
    assert len(kv.tokens) == most - least


def test_other_contexts_are_whole_whatever_the_chunk(engine: TransformersEngine) -> None:
    how = encoding_context("prefix", engine)
    assert how.before((7,) * 5000) == how.context == engine.template.prefix


def test_kv_has_nothing_of_other_documents(tmp_path: Path) -> None:
    """The same text has the same KV in stores of other documents, to the rounding of a batch."""
    text = "The boat of Ilse Brandt is green."
    found = []
    for name, others in (("a", []), ("b", [Document("secret", "The password is heron.")])):
        with scene.small(tmp_path / name) as cache:
            cache.add([*others, Document("boat", text)])
            kv = cache.store.get(next(iter(cache.indexing.keys("boat"))))
            assert isinstance(kv, ChunkKV)
            found.append(kv)
    one, other = found
    for what in ("keys", "values"):
        for a, b in zip(getattr(one, what), getattr(other, what), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(one.sensitivity), torch.tensor(other.sensitivity), atol=1e-5, rtol=1e-4
    )
