"""What chunks are computed after."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.core.request import Misses, Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import DEFAULT_CONTEXT, PROSE_TOKENS, encoding_context
from ragcache.planning.prose import PROSE
from ragcache.types import Chunk, ChunkKV, Document, Sampling
from tests import models, scene


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama", max_position_embeddings=4096)


def test_prose_follows_the_prefix(engine: TransformersEngine) -> None:
    how, prefix = encoding_context("prose", engine), engine.template.prefix
    assert how.context[: len(prefix)] == prefix
    texts = [engine.template.chunk(text) for text in PROSE]
    whole = [text for n, text in enumerate(texts) if sum(map(len, texts[: n + 1])) <= PROSE_TOKENS]
    assert whole
    assert how.context[len(prefix) :] == tuple(chain.from_iterable(whole))
    key = how.key(engine.fingerprint, (5, 6, 7))
    assert (key.mode, key.context) == (DEFAULT_CONTEXT, how.context)


def test_a_short_context_is_mostly_left_to_chunks() -> None:
    engine = models.engine("llama", max_position_embeddings=512)
    how = encoding_context("prose", engine)
    assert len(how.context) <= len(engine.template.prefix) + 512 // 4


@pytest.mark.parametrize("name", ["prose", "prefix", "link0"])
def test_a_long_chunk_has_as_much_of_it_before_as_fits(
    engine: TransformersEngine, name: str
) -> None:
    how, most = encoding_context(name, engine), engine.context_tokens
    whole = len(how.context)
    for room in (0, 1, 2, whole - 1, whole, whole + 1, most - 1):
        before = how.before((7,) * (most - room))
        assert len(before) == min(whole, max(1, room))
        assert before == (how.context[0], *how.context[whole - len(before) + 1 :])


@pytest.mark.parametrize("name", ["prose", "prefix"])
@pytest.mark.parametrize("misses", ["exact", "consistent"])
def test_a_chunk_that_fits_a_prompt_is_stored_too(
    tmp_path: Path, name: str, misses: Misses
) -> None:
    """A chat may begin with less text than the store's own prompts."""
    with scene.small(tmp_path, encoding_context=name) as cache:
        most, chunk = cache.engine.context_tokens, "She likes it"

        def asked() -> list[dict[str, Any]]:
            content = [{"type": "chunk", "text": chunk}, {"type": "text", "text": "Who?"}]
            return [{"role": "user", "content": content}]

        chunk += "." * (most - len(cache.prompt(Request(messages=asked()))) - 1)
        context = cache.indexing.key(Chunk("a", 0, chunk)).context
        assert 0 < len(context) < len(cache.template.prefix)
        for stored in (False, True):
            sampling = Sampling(max_tokens=1)
            answer = cache.ask(messages=asked(), misses=misses, sampling=sampling)
            assert len(answer.prompt) == most - 1
            assert (answer.report.reused_tokens > 0) == stored


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
