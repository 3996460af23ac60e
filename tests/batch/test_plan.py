"""Plans of corpora and their execution: missing chunks, batches, and skipped documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ragcache.batch.plan import PrecomputePlan, Shard, WorkSize, make_plan
from ragcache.batch.run import compute_locally, measure_tokens_per_second, run
from ragcache.errors import ConfigError
from ragcache.planning.flops import ModelShape
from ragcache.rag import RagCache
from ragcache.retriever.split import WHOLE
from ragcache.types import Document
from tests import scene
from tests.store.samples import same

DOCUMENTS = [
    Document(f"d{i}", " ".join(f"Mira keeps {i * n} parrots." for n in range(1 + i % 5)))
    for i in range(40)
]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path / "store") as made:
        yield made


def planned(
    cache: RagCache, shard: str = "1/1", documents: list[Document] = DOCUMENTS
) -> PrecomputePlan:
    return make_plan(cache, documents, shard=Shard.parse(shard), batch_tokens=128)


def do(cache: RagCache, work: PrecomputePlan, limit: int | None = None) -> WorkSize:
    return run(cache.store, work, compute_locally(cache.engine), limit=limit).computed


def equal(left: RagCache, right: RagCache) -> bool:
    """Whether two stores have the same chunks, bit for bit."""
    keys = {k.digest: k for work in (planned(left),) for b in work.batches for k in b.keys}
    assert not keys, "everything is stored"
    return list(left.store.keys()) == list(right.store.keys()) and all(
        same(left.store.get(key), right.store.get(key))
        for document in DOCUMENTS
        for key in map(left.indexing.key, left.indexing.splitter.split(document))
    )


def test_a_plan_says_what_is_missing_and_a_run_does_it(cache: RagCache, tmp_path: Path) -> None:
    work = planned(cache)
    chunks = [key for batch in work.batches for key in batch.keys]
    assert work.documents == 40 and work.wanted == work.missing and work.stored == WorkSize()
    assert work.missing.chunks == len(chunks) == len({key.digest for key in chunks})
    assert work.missing.tokens == sum(len(key.tokens) for key in chunks)
    engine = cache.engine
    model = ModelShape(engine.spec, engine.parameters, engine.heads)
    flops = sum(model.flops(len(key.tokens), len(key.context)) for key in chunks)
    assert work.missing.flops == pytest.approx(2 * flops)
    done = do(cache, work)
    assert done == work.missing
    assert cache.store.stats().payload_bytes == done.payload_bytes
    again = planned(cache)
    assert again.missing == WorkSize() and again.wanted == again.stored == work.wanted
    assert do(cache, again) == WorkSize()
    with scene.small(tmp_path / "indexed") as other:
        other.add(DOCUMENTS)
        assert list(other.store.keys()) == list(cache.store.keys())
    added = cache.add(DOCUMENTS)
    assert added.documents == 40 and added.precomputed.encoded == 0


def test_shards_and_limits_make_the_same_store(cache: RagCache, tmp_path: Path) -> None:
    whole = do(cache, planned(cache))
    with scene.small(tmp_path / "parts") as other:
        parts = [do(other, planned(other, shard)) for shard in ("1/3", "2/3", "3/3")]
        assert sum(parts, WorkSize()) == whole and all(part.chunks for part in parts)
        assert equal(cache, other)
    with scene.small(tmp_path / "limited") as other:
        runs = 0
        while (done := do(other, planned(other), limit=1)).chunks:
            assert done.tokens <= 128
            runs += 1
        assert runs > 3 and equal(cache, other)


def test_what_others_store_meanwhile_is_left_out(cache: RagCache) -> None:
    work = planned(cache)
    first = next(work.batches)
    engine, computing = cache.engine, compute_locally(cache.engine)
    cache.store.put_all(zip(first.keys, next(computing([first]))[1], strict=True))
    assert do(cache, work) == work.missing - work.estimator.of(first)
    assert engine is cache.engine and cache.store.verify() == {}


def test_documents_that_cannot_be_done_are_skipped(cache: RagCache) -> None:
    long = Document("long", "A parrot. " * 400, WHOLE)
    uncut = Document("uncut", "\N{OGHAM SPACE MARK}" * 3 + "x" * 10_000)
    blank = Document("blank", " \n ")
    work = planned(cache, documents=[DOCUMENTS[3], long, blank, uncut, DOCUMENTS[4]])
    assert work.documents == 5
    assert [one.document for one in work.skipped] == ["long"]
    assert "the context is 512" in work.skipped[0].why
    assert do(cache, work) == work.wanted


def test_an_empty_corpus_needs_nothing(cache: RagCache) -> None:
    work = planned(cache, documents=[])
    assert work.wanted == WorkSize() and measure_tokens_per_second(cache.engine, work) is None
    assert do(cache, work) == WorkSize()


def test_progress_says_what_is_done(cache: RagCache) -> None:
    work = planned(cache)
    assert (measure_tokens_per_second(cache.engine, work) or 0) > 0
    seen = list[WorkSize]()
    run(
        cache.store,
        work,
        compute_locally(cache.engine),
        progress=lambda done: seen.append(done.computed),
    )
    assert len(seen) > 2 and seen == sorted(seen, key=lambda one: one.tokens)
    assert (seen[-1].chunks, seen[-1].tokens) == (work.missing.chunks, work.missing.tokens)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_shards_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="is invalid: give i/n"):
        Shard.parse(text)
