"""Many questions to one engine: what is computed, read and stored for them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ragcache import setup as opening
from ragcache.api.service import Service
from ragcache.api.ticket_queue import RequestCancelled, Ticket
from ragcache.blend.fuse import FusionCallbacks
from ragcache.core.request import Request
from ragcache.engine.base import LayerView
from ragcache.errors import StoreError
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import ServiceSettings, Settings
from ragcache.store import StoredChunk
from ragcache.types import Answer, Sampling
from tests import scene
from tests.api.scene import SOON, Heard, Held, NewThreads, asked, given, settle, small

QUESTION = "Where does Mira Holt live?"
TEXTS = [document.text for document in scene.DOCUMENTS]


def test_questions_over_the_same_missing_chunks_encode_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path) as service:
        engine, encode = service.default_cache.engine, service.default_cache.engine.encode
        context = service.default_cache.indexing.encoding.context
        encoded = Counter[tuple[int, ...]]()

        def counted(chunks: Sequence[tuple[int, ...]], **options: Any) -> Any:
            if options.get("context", ()) in (context, ()):  # not for sensitivity
                encoded.update(map(tuple, chunks))
            return encode(chunks, **options)

        monkeypatch.setattr(engine, "encode", counted)
        heard = [Heard(str(n)) for n in range(6)]
        with Held(service.scheduler):
            for one in heard:
                service.submit("", Request(QUESTION, chunks=given(*TEXTS)), one)
        assert {one.end() for one in heard} == {"done"}
        settle(service)
        wanted = {engine.template.chunk(text) for text in TEXTS}  # texts are taken from the prompt
        assert encoded == Counter(dict.fromkeys(wanted, 1))
        again = asked(service, QUESTION, chunks=given(*TEXTS)).report
        assert {chunk.miss for chunk in again.chunks} == {None}


def test_questions_over_the_same_chunks_read_each_layer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path, ram_bytes=1 << 24) as service:
        asked(service, QUESTION, chunks=given(*TEXTS))  # computes and stores them
        reads, layers = Counter[tuple[bytes, int]](), service.default_cache.store.layers

        def counted(chunks: Sequence[StoredChunk], layer: int) -> list[tuple[Tensor, Tensor]]:
            reads.update((chunk.key.digest, layer) for chunk in chunks)
            return layers(chunks, layer)

        monkeypatch.setattr(service.default_cache.store, "layers", counted)
        heard = [Heard(str(n)) for n in range(6)]
        with Held(service.scheduler):
            for one in heard:
                service.submit("", Request(QUESTION, chunks=given(*TEXTS)), one)
        assert {one.end() for one in heard} == {"done"}
        assert set(reads.values()) == {1}
        assert (
            len(reads) == 4 * service.default_cache.engine.spec.layers
        )  # three chunks and the prefix


def test_an_answer_that_was_at_hand_leaves_nothing_to_do(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        asked(service, QUESTION, chunks=given(*TEXTS))
        stream = service.default_cache.stream(QUESTION, chunks=TEXTS, keep=False)
        assert not stream.misses and stream.answer and not stream.misses
        other = service.default_cache.stream(QUESTION, chunks=["new"], keep=False)
        assert other.answer and other.misses
        other.keep()
        assert not other.misses


def test_a_hundred_clients_give_up(tmp_path: Path, new_threads: NewThreads) -> None:
    """Half of them after the first piece, the others while they wait."""
    with small(tmp_path, queue=100, max_bytes="1GB") as service:
        for tenant in "abcd":
            service.add(tenant, scene.DOCUMENTS).result(SOON)
        settle(service)
        heard = [_Leaving(n % 2 == 0) for n in range(100)]
        long = Sampling(max_tokens=200)
        with Held(service.scheduler):
            for number, one in enumerate(heard):
                ask = Request(f"{QUESTION} {number}", sampling=long)
                one.goes_by(service.submit("abcd"[number % 4], ask, one))
        assert {one.end() for one in heard} == {"RequestCancelled"}
        assert {len(one.pieces) for one in heard} == {0, 1}
        assert sum(len(one.pieces) for one in heard) == 50
        assert service.scheduler.depth() == (0, 0)
        settle(service)
        assert new_threads() == {
            f"ragcache-{name}" for name in ("engine", "engine-clock", "splitter", "splitter-clock")
        }
        for tenant in "abcd":
            capacity = service.cache(tenant).store._capacity
            assert capacity is not None and not capacity._leased
            assert asked(service, QUESTION, tenant=tenant).text is not None
    assert not new_threads()  # and all stores could be closed: no transaction was left open


class _Leaving(Heard):
    """Gives up after the first piece, or at once."""

    def __init__(self, listens: bool) -> None:
        super().__init__()
        self.listens, self._ticket = listens, threading.Event()

    def goes_by(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self._ticket.set()
        if not self.listens:
            ticket.cancel()

    def __call__(self, how: str, what: Any) -> None:
        super().__call__(how, what)
        assert self._ticket.wait(SOON)
        self.ticket.cancel()


@pytest.mark.parametrize("mode", ["full", "fused", "cacheblend"])
def test_a_prefill_stops_at_the_next_layer(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch, new_threads: NewThreads
) -> None:
    with small(tmp_path) as service:
        asked(service, QUESTION, chunks=given(*TEXTS))
        tickets: list[Ticket] = []
        begun: list[int] = []
        before = FusionCallbacks.before

        def leaves(callbacks: FusionCallbacks, layer: int, kv: LayerView) -> Tensor:
            rows = before(callbacks, layer, kv)
            begun.append(layer)
            if layer == 1:
                tickets[0].cancel()
            return rows

        monkeypatch.setattr(FusionCallbacks, "before", leaves)
        heard = Heard()
        with Held(service.scheduler):
            ask = Request(QUESTION, chunks=given(*TEXTS), mode=mode)
            tickets.append(service.submit("", ask, heard))
        assert heard.end() == "RequestCancelled" and isinstance(heard.ends[0][1], RequestCancelled)
        assert begun == [0, 1]
        settle(service)
        assert "ragcache-reader_0" not in new_threads()


def test_what_is_wrong_with_a_question_is_told(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        for tenant, ask, error in [
            ("", Request(" "), "PromptError"),
            ("", Request(QUESTION, mode="blend"), "ConfigError"),
            ("NO", Request(QUESTION), "ConfigError"),
        ]:
            heard = Heard()
            service.submit(tenant, ask, heard)
            assert heard.end() == error
        assert isinstance(asked(service, QUESTION), Answer)


@pytest.mark.parametrize(
    ("given_share", "share", "floor"), [(None, 0.01, 0.9), (0.5, 0.5, 0.9), (0.0, None, None)]
)
def test_the_settings_open_it_with_a_guard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given_share: float | None,
    share: float | None,
    floor: float | None,
) -> None:
    monkeypatch.setattr(opening, "load_embedder", lambda *_: HashEmbedder())
    settings = Settings.load(
        store=tmp_path / "store",
        model=str(scene.save_model(tmp_path / "model")),
    )
    limits = ServiceSettings.load(monitor_share=given_share, monitor_floor=0.9)
    with Service.open(settings, limits) as service:
        guard = service.quality_monitor
        assert (guard and guard.share, guard and guard.floor) == (share, floor)
        assert service.cache("a").engine is service.default_cache.engine


def test_a_store_that_opens_slowly_keeps_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small(tmp_path) as service:
        begun, go, real = threading.Event(), threading.Event(), RagCache.open

        def slow(path: Path, **options: Any) -> RagCache:
            if options["tenant"] == "slow":
                begun.set()
                assert go.wait(SOON)
            return real(path, **options)

        monkeypatch.setattr(RagCache, "open", slow)
        with ThreadPoolExecutor(2) as pool:
            opening = [pool.submit(service.cache, "slow") for _ in range(2)]
            assert begun.wait(SOON)
            assert service.caches() == [service.default_cache]  # as /ready asks
            assert service.cache("quick") is service.cache("quick")
            go.set()
            first, second = (future.result(SOON) for future in opening)
        assert first is second and len(service.caches()) == 3


def test_every_store_is_closed_whatever_becomes_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = small(tmp_path)
    other = service.cache("ann")

    def fails() -> None:
        raise ZeroDivisionError

    real = other.close
    monkeypatch.setattr(other, "close", fails)
    with pytest.raises(ZeroDivisionError):
        service.close()
    real()
    with pytest.raises(StoreError, match="is closed: open it again"):
        service.default_cache.store.stats()


def test_many_tenants_can_be_open(tmp_path: Path) -> None:
    """The addresses that their maps reserve are few enough."""
    with small(tmp_path) as service:
        sizes = [service.cache(f"t{number}").store.tables.map_size for number in range(3)]
        assert 500 * max(sizes) < 1 << 47 > service.default_cache.store.tables.map_size
        assert len(service.caches()) == 4
