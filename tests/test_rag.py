"""RagCache: add documents, and get fused answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch

from ragcache import setup
from ragcache.blend import BLENDERS
from ragcache.engine.base import Engine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError, PromptError, SourceError, StoreError
from ragcache.planning.context import encoding_context
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.base import Miss
from ragcache.store.disk.store import DiskStore
from ragcache.store.tiers.ram import RamTier
from ragcache.types import Document, Sampling
from tests import models, scene

MODES = [*BLENDERS, "reuse:positions=overlapping", "prophet+full_layers=1"]
QUESTION = "Where does Mira Holt live?"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RagCache]:
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        yield cache


def test_add_precomputes_every_chunk_once(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        check_adding(cache)


def check_adding(cache: RagCache) -> None:
    first = cache.add(scene.DOCUMENTS)
    assert first.documents == 3 and first.precomputed.encoded == first.chunks + 1  # the prefix
    again = cache.add(scene.DOCUMENTS)
    assert (again.documents, again.unchanged, again.precomputed.encoded) == (0, 3, 0)
    changed = Document("holt", "Mira Holt moved to Bexley.")
    third = cache.add([changed])
    assert (third.documents, third.precomputed.encoded) == (1, third.chunks)
    texts = [p.chunk.text for p in cache.retrieve("Mira Holt", top_k=9)]
    assert "Mira Holt moved to Bexley." in texts and not any("parrot" in t for t in texts)


def test_metadata_that_changes_is_found_as_it_is(cache: RagCache) -> None:
    text = scene.DOCUMENTS[0].text
    for metadata in ({"a=b": "c"}, {"a": "b=c"}, {"a\\=b": "c"}, {"a\\": "b=c"}):
        assert cache.add([Document("one", text, metadata)]).documents == 1
        assert cache.add([Document("one", text, metadata)]).unchanged == 1
        found = cache.retrieve("Mira", top_k=9, filter=metadata)
        assert {passage.chunk.document for passage in found} == {"one"}


def test_old_kv_goes_with_the_last_text_that_used_it(cache: RagCache) -> None:
    store, before = cache.store, cache.store.stats().chunks
    old = cache.indexing.keys("holt")
    cache.add([Document("copy", scene.DOCUMENTS[0].text), Document("holt", "Mira left.")])
    assert all(map(store.has, old))  # the copy has the same chunks
    assert cache.delete(["copy", "nobody"]) == ["copy"]
    assert not any(map(store.has, old)) and all(map(store.has, cache.indexing.keys("holt")))
    assert store.stats().chunks == before - len(old) + 1
    assert cache.delete(["holt"]) == ["holt"] and cache.indexing.keys("holt") == []
    assert not any("Mira left." in p.chunk.text for p in cache.retrieve("Mira", top_k=9))


def test_a_document_whose_time_is_over_is_not_found(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add([Document("news", "The Gull sails on Friday.")], ttl_s=60, pinned=True)
    cache.add(scene.DOCUMENTS[:1], ttl_s=3600)
    [news] = [entry for entry in cache.documents() if entry.id == "news"]
    assert news.pinned and news.expires is not None
    [key, *_] = cache.indexing.keys("news")
    assert any(
        "Friday" in p.chunk.text for p in cache.retrieve("When does the Gull sail?", top_k=9)
    )
    monkeypatch.setattr(time, "time", lambda: news.expires)
    assert not any("Friday" in p.chunk.text for p in cache.retrieve("When does it sail?", top_k=9))
    assert not cache.store.has(key)
    assert [e.id for e in cache.documents()] == sorted(d.id for d in scene.DOCUMENTS)
    with pytest.raises(ConfigError, match="ttl_s is 0: give more than 0 seconds"):
        cache.add([], ttl_s=0)


def test_fused_leaves_a_first_chunk_alone_that_stands_where_it_was_computed(tmp_path: Path) -> None:
    """Nothing in it is wrong."""
    with scene.small(tmp_path, encoding_context="prefix") as cache:
        cache.add(scene.DOCUMENTS)
        answer = cache.ask(QUESTION, ratio=0.3)
    first, *others = answer.report.chunks
    assert first.recomputed == 0 < sum(chunk.recomputed for chunk in others)
    assert answer.report.bytes_loaded


@pytest.mark.parametrize("context", ["prefix", "prose"])
def test_every_order_of_chunks_reuses_as_much(tmp_path: Path, context: str) -> None:
    with scene.small(tmp_path, encoding_context=context) as cache:
        cache.add(scene.DOCUMENTS)
        passages = cache.retrieve(QUESTION, top_k=3, neighbours=0)
        reports = [
            cache.ask(QUESTION, chunks=order, ratio=0.3, keep=False).report
            for order in permutations(passages)
        ]
    assert len(passages) == 3 and len({report.reused_tokens for report in reports}) == 1
    assert len({report.bytes_loaded for report in reports}) == 1


def test_a_tier_in_ram_answers_the_same(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        want = cache.ask(QUESTION)
    with scene.small(tmp_path, ram_bytes=1 << 24) as cache:
        assert isinstance(cache.chunks, RamTier)
        first, second = cache.ask(QUESTION), cache.ask(QUESTION)
        assert first.text == second.text == want.text
        assert second.report.chunks == want.report.chunks
        assert cache.chunks.ram.hits > 0
        cache.delete(["holt"])
        assert not any(c.id.startswith("holt") for c in cache.ask(QUESTION).report.chunks)


def test_reopened_it_has_lost_nothing(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        before = cache.ask(QUESTION)
    with scene.small(tmp_path) as cache:
        after = cache.ask(QUESTION)
        assert cache.add(scene.DOCUMENTS).precomputed.encoded == 0
    assert after.text == before.text
    assert after.report.chunks == before.report.chunks
    assert all(chunk.miss is None for chunk in after.report.chunks)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_and_accounts(cache: RagCache, mode: str) -> None:
    if mode == "cachecraft":
        cache.ask(QUESTION, mode=mode)  # leaves the variants that it computes
    if mode == "prefix":
        cache.ask(QUESTION, mode=mode)  # stores the chunks behind this prompt's prefix
    answer = cache.ask(QUESTION, mode=mode)
    report = answer.report
    assert len(answer.tokens) <= 6 and answer.stopped in ("eos", "length")
    assert 0 < report.ttft_s <= report.total_s
    assert report.chunk_tokens == sum(chunk.tokens for chunk in report.chunks)
    assert [chunk.id for chunk in report.chunks] == [p.chunk.id for p in answer.passages]
    assert len(report.layers) == cache.engine.spec.layers
    reusable = report.reused_tokens + report.recomputed_tokens
    if mode == "full":
        assert (reusable, report.bytes_loaded, report.charged_budget) == (0, 0, 1.0)
    else:
        loaded = report.prefix_tokens + reusable
        layers = 4 - (mode in ("cacheblend", "kvshare"))  # layer 0 is computed in full
        assert report.bytes_loaded == layers * cache.engine.spec.layer_bytes(loaded)
        charged = sum(layer.charged + report.late_tokens for layer in report.layers)
        charged += report.probe_rows
        assert report.charged_budget == pytest.approx(charged / (len(report.layers) * reusable))


def test_ratio_1_gives_full_prefills_answer(cache: RagCache) -> None:
    full = cache.ask(QUESTION, mode="full")
    for mode in ("cacheblend", "random"):
        assert cache.ask(QUESTION, mode=mode, ratio=1.0).tokens == full.tokens
    assert cache.ask(QUESTION, mode="prefix").tokens == full.tokens


def test_prefix_mode_reuses_an_earlier_prompt_whole(cache: RagCache) -> None:
    passages = cache.retrieve(QUESTION)
    first = cache.ask(QUESTION, mode="prefix", chunks=passages).report
    again = cache.ask("And where is Bexley?", mode="prefix", chunks=passages).report
    assert first.reused_tokens < first.chunk_tokens
    assert again.reused_tokens == again.chunk_tokens
    full = cache.ask(QUESTION, mode="full", chunks=passages)
    assert cache.ask(QUESTION, mode="prefix", chunks=passages).tokens == full.tokens


def test_stream_gives_the_answer_in_pieces(cache: RagCache) -> None:
    stream = cache.stream(QUESTION)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == cache.ask(QUESTION).text


def test_a_stream_is_taken_up_where_it_was_left(cache: RagCache) -> None:
    stream = cache.stream(QUESTION)
    first = next(iter(stream))
    rest = "".join(stream)
    assert first + rest == stream.answer.text == stream.answer.text
    closed = cache.stream(QUESTION)
    next(iter(closed))
    iter(closed).close()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="not finished"):
        _ = closed.answer


def test_two_documents_of_one_id_are_refused(cache: RagCache) -> None:
    with pytest.raises(SourceError, match="'a'.*an id of its own"):
        cache.add([Document("a", "one"), Document("a", "two")])


def test_given_chunks_are_computed_once_and_kept(cache: RagCache) -> None:
    texts = ["A chunk nobody indexed.", "And another one."]
    first = cache.ask(QUESTION, chunks=texts)
    assert [chunk.miss for chunk in first.report.chunks] == ["absent", "absent"]
    assert first.tokens == cache.ask(QUESTION, chunks=texts, mode="full").tokens
    assert "2 of 2 chunks computed, not loaded: absent" in first.report.fallbacks[0]
    again = cache.ask(QUESTION, chunks=texts[::-1]).report
    assert [chunk.miss for chunk in again.chunks] == [None, None] and not again.fallbacks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "chunks", [[], ["one chunk"], ["twice the same"] * 2], ids=["none", "one", "repeated"]
)
def test_any_number_of_chunks(cache: RagCache, mode: str, chunks: list[str]) -> None:
    for _ in range(2):  # not stored, then stored
        answer = cache.ask(QUESTION, mode=mode, chunks=chunks)
        assert len(answer.report.chunks) == len(chunks)
    if mode in ("full", "prefix"):
        assert answer.tokens == cache.ask(QUESTION, mode="full", chunks=chunks).tokens


def test_overlapping_encodes_what_is_missing_and_says_so(cache: RagCache) -> None:
    report = cache.ask(QUESTION, mode="reuse:positions=overlapping", chunks=["new"]).report
    assert report.chunks[0].miss == "absent" and report.reused_tokens == 0
    assert report.fallbacks == (
        "1 of 1 chunks computed alone before the prompt: absent (these tokens are not stored)",
    )


def test_a_record_that_rots_is_recomputed_and_said(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third layer of one chunk fails its checksum while the prompt is being fused."""
    want = cache.ask(QUESTION, mode="cacheblend", ratio=1.0)
    key = cache.indexing.keys(want.passages[0].chunk.document)[want.passages[0].chunk.ordinal]
    with cache.store.tables.write() as txn:
        name = key.digest + (2).to_bytes(2, "big")
        raw = bytearray(txn.get("layers", name) or b"")
        raw[17] ^= 1
        txn.put("layers", name, bytes(raw))
    answer = cache.ask(QUESTION, mode="cacheblend", ratio=1.0)
    assert answer.tokens == want.tokens
    assert answer.report.chunks[0].miss == "corrupt"
    assert any("chunk 1 was recomputed" in note for note in answer.report.fallbacks)
    assert cache.store.stats().misses["corrupt"] >= 1
    healed = cache.ask(QUESTION, mode="cacheblend", ratio=1.0)
    assert healed.report.chunks[0].miss is None  # computed again and stored


def test_another_models_store_is_refused_and_kept(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        stored = cache.add(scene.DOCUMENTS).precomputed.encoded
    with scene.small(tmp_path, seed=1) as other:
        with pytest.raises(StoreError, match=f"0 of {stored} stored chunks are usable: built for"):
            other.ask(QUESTION)
        assert other.usable() == (0, stored)
        key = other.indexing.keys("holt")[0]
        miss = other.store.get_header(key)
        assert isinstance(miss, Miss) and miss.reason == "stale"
        other.add(scene.DOCUMENTS)  # adds its own KV beside the other's
        assert other.usable() == (stored, 2 * stored)
        assert all(c.miss is None for c in other.ask(QUESTION).report.chunks)
    with scene.small(tmp_path) as cache:
        assert cache.add(scene.DOCUMENTS).precomputed.encoded == 0


def test_a_second_model_of_another_tokenizer_keeps_the_kv_of_the_first(tmp_path: Path) -> None:
    long = Document("long", " ".join(document.text for document in scene.DOCUMENTS))
    with scene.small(tmp_path) as cache:
        stored = cache.add([long]).precomputed.encoded
        keys = cache.indexing.keys("long")
    engine = TransformersEngine(models.model(seed=1), models.tokenizer(300), name="other")
    settings = Settings.load(max_tokens=6, ratio=0.15)
    with RagCache(engine, DiskStore(tmp_path), HashEmbedder(), tmp_path, settings) as other:
        added = other.add([long])
        assert (added.documents, added.precomputed.encoded) == (0, stored)
        assert set(keys).isdisjoint(other.indexing.keys("long"))
        assert other.usable() == (stored, 2 * stored)
    with scene.small(tmp_path) as cache:
        assert cache.add([long]).precomputed.encoded == 0 and all(map(cache.store.has, keys))
        cache.delete(["long"])
        assert cache.store.stats().chunks == 2  # both prefixes


def test_what_cannot_be_is_refused_before_any_work(cache: RagCache) -> None:
    with pytest.raises(ConfigError, match="mode 'blend' is unknown"):
        cache.ask(QUESTION, mode="blend")
    with pytest.raises(ConfigError, match="from 0 to 1"):
        cache.ask(QUESTION, ratio=1.5)
    with pytest.raises(PromptError, match="the question is empty"):
        cache.ask("  ")
    with pytest.raises(PromptError, match="a chunk is empty"):
        cache.ask(QUESTION, chunks=["", "text"])
    with pytest.raises(ConfigError, match="^k is 0: ask for at least 1"):
        cache.ask(QUESTION, top_k=0)


def test_a_chunk_longer_than_the_context_is_refused(cache: RagCache) -> None:
    with pytest.raises(PromptError, match="has a context of 512"):
        cache.ask(QUESTION, chunks=["word and " * 400])
    with pytest.raises(PromptError, match="has a context of 512"):
        cache.ask(QUESTION, sampling=Sampling(max_tokens=600))


def test_nothing_is_retrieved_from_an_empty_store(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        answer = cache.ask(QUESTION)
    assert answer.passages == () and answer.report.chunk_tokens == 0


def test_open_remembers_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragcache import setup
    from ragcache.retriever.embed import HashEmbedder

    monkeypatch.setattr(setup, "load_embedder", lambda *_: HashEmbedder())
    model = scene.save_model(tmp_path / "model")
    with RagCache.open(tmp_path / "store", str(model)) as cache:
        cache.add(scene.DOCUMENTS)
        fingerprint = cache.engine.fingerprint
        assert isinstance(cache.engine, Engine)
        logits = cache.engine.prefill((1, 2, 3)).logits
    with RagCache.open(tmp_path / "store") as cache:
        assert cache.engine.fingerprint == fingerprint
        assert isinstance(cache.engine, Engine)
        assert torch.equal(cache.engine.prefill((1, 2, 3)).logits, logits)


@pytest.mark.parametrize("mode", ["bos", "link0"])
def test_a_store_keeps_its_compile_mode(tmp_path: Path, mode: str) -> None:
    with scene.small(tmp_path, encoding_context=mode) as cache:
        cache.add(scene.DOCUMENTS)
        [key, *_] = cache.indexing.keys("holt")
        bos = cache.engine.bos
        assert key.mode == mode and key.context == (bos,) * (1 if mode == "bos" else 4)
        kv = cache.store.get(key)
        assert not isinstance(kv, Miss)
        want = cache.engine.encode([key.tokens], context=key.context)[0]
        for a, b in zip(kv.keys, want.keys, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with scene.small(tmp_path) as cache:
        assert all(chunk.miss is None for chunk in cache.ask(QUESTION).report.chunks)
    with scene.small(tmp_path, encoding_context="prefix") as cache:
        report = cache.ask(QUESTION).report
        assert {chunk.miss for chunk in report.chunks} == {"stale"}
        assert any(f"stored in mode {mode}, asked for mode prefix" in f for f in report.fallbacks)


def test_a_store_that_says_no_compile_mode_is_new_or_an_old_one(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        parts = cache.catalog, cache.engine, cache.settings, cache.template
        for model, mode in ((None, "prose"), ("llama", "prefix")):
            cache.catalog.drop_setting("compile")
            if model is not None:
                cache.catalog.put_setting("model", model)
            assert setup.resolve_encoding_context(*parts).mode == mode
            assert cache.catalog.get_setting("compile") == mode


def test_a_store_of_a_compile_mode_that_is_gone_is_computed_again(tmp_path: Path) -> None:
    with scene.small(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        cache.catalog.put_setting("compile", "enriched(3)")
        for key in cache.indexing.keys("holt"):
            cache.store.delete(key)
        with pytest.raises(ConfigError, match=r"enriched\(3\) no longer .*-context prefix"):
            setup.resolve_encoding_context(
                cache.catalog, cache.engine, cache.settings, cache.template
            )
    with scene.small(tmp_path, encoding_context="prefix") as cache:
        assert cache.add(scene.DOCUMENTS).precomputed.encoded
        assert not cache.ask(QUESTION).report.fallbacks


def test_a_compile_mode_that_cannot_be_is_refused() -> None:
    engine = models.engine("llama")
    with pytest.raises(ConfigError, match="encoding context 'bare' is unknown: use one of prose"):
        encoding_context("bare", engine)
    engine.bos = None
    with pytest.raises(ConfigError, match="link0 needs a BOS token, which llama does not have"):
        encoding_context("link0", engine)


def test_a_misspelt_option_is_named_with_the_right_one(cache: RagCache) -> None:
    for asked in (cache.ask, cache.stream):
        with pytest.raises(TypeError, match=r"tpo_k: unknown option.* Did you mean top_k\? "):
            asked(QUESTION, tpo_k=3)  # type: ignore[call-arg]
