"""With ``misses=consistent``, an answer does not depend on earlier requests.

Prompts from a window that moves over documents are asked in several orders, by four threads, of a
store that evicts all the time and is reopened halfway. Answers must have the same tokens in every
order, and their first logits the same bits: what is missing is computed alone, one chunk per
forward, so every forward of a request has the same rows and the same inputs, whatever is stored.

Batching may change bits elsewhere: indexing computes the KV of several chunks in one forward, and
``misses=exact`` computes that of texts in the prompt's forward. Sums are then rounded in another
order. What such requests leave in the store is used as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.core.request import Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.langchain.local_backend import LocalBackend
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.disk.quota import Quota
from ragcache.store.disk.store import DiskStore
from ragcache.types import Answer, Chunk, Tokens
from tests import models
from tests.api.scene import Heard

WINDOW = 4  # chunks of a prompt
CLIENTS = 4
ROOM = 2  # prompts whose KV the store holds

NAMES = "Mira Holt", "Ada Birch", "Tom Avon", "Ines Mill", "Olaf Bexley"
PLACES = "Oslo", "Bexley", "the mill", "a small town by the sea", "the river Avon"


def text(number: int) -> str:
    """A chunk; their lengths differ."""
    name, place = NAMES[number % len(NAMES)], PLACES[number // 3 % len(PLACES)]
    more = " She was born by the sea." * (number % 3)
    return f"{name} keeps house {number} in {place}.{more} Her father built {number * 7} boats."


def request(number: int, **options: Any) -> Request:
    """Chunks of which the next request has all but the first. Every third request is a chat, with
    texts before the chunks that others have too."""
    chunks = [Chunk("given", n, text(n)) for n in range(number, number + WINDOW)]
    question = f"Where does {NAMES[number % len(NAMES)]} live?"
    if number % 3:
        return Request(question, chunks=chunks, **options)
    chat = [
        {"role": "system", "content": f"Answer as {NAMES[number // 12 % len(NAMES)]} would."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": PLACES[number // 6 % len(PLACES)]},
        {"role": "user", "content": question},
    ]
    return Request(messages=chat, chunks=chunks, **options)


@contextmanager
def opened(path: Path, engine: TransformersEngine, room: int | None = None) -> Iterator[RagCache]:
    """A store of one engine, without any chunk of a document."""
    settings = Settings.load(store=path, max_tokens=4, misses="consistent")
    store = DiskStore(path, quota=Quota(room))
    with RagCache(engine, store, HashEmbedder(), path, settings) as cache:
        yield cache


def engine_of(codec: str) -> TransformersEngine:
    return TransformersEngine(models.model(), models.tokenizer(), name="llama", codec=codec)


Asked = tuple[Tokens, Tensor]


def ask(cache: RagCache, number: int, **options: Any) -> Asked:
    """The tokens of an answer, and the logits of its first one."""
    stream = cache.generate(request(number, **options))
    return stream.answer.tokens, stream.first_logits


def through_service(cache: RagCache, numbers: Sequence[int]) -> list[tuple[Tokens, Tensor | None]]:
    """Four clients of the service. Every second request is queued as routes do it, so that several
    answers are decoded in turns and what was missing is stored later; the logits of those are not
    known."""
    scheduler = Scheduler(queue=len(numbers), background_delay_s=0.0)
    service = Service(cache, scheduler, None, ServiceSettings.load())

    def client(number: int) -> tuple[Tokens, Tensor | None]:
        if number % 2:
            return service.call("", lambda own: ask(own, number)).result()
        heard = Heard(str(number))
        service.submit("", request(number), heard)
        assert heard.end() == "done", heard.ends
        answer = heard.pieces[-1]
        assert isinstance(answer, Answer)
        return answer.tokens, None

    try:
        with ThreadPoolExecutor(CLIENTS) as clients:
            return list(clients.map(client, numbers))
    finally:
        service.drain(30.0)


def through_langchain(cache: RagCache, numbers: Sequence[int]) -> list[Asked]:
    """Four threads of the backend of LangChain's classes."""
    backend = LocalBackend(cache, owned=False)
    with ThreadPoolExecutor(CLIENTS) as clients:
        found = list(clients.map(lambda n: backend.run(lambda own: ask(own, n)), numbers))
    backend.scheduler.close()
    return found


def check_orders(folder: Path, codec: str, count: int, orders: int) -> None:
    """Ask ``count`` prompts in so many orders, each with a store of its own, and compare."""
    engine = engine_of(codec)
    with opened(folder / "size", engine) as cache:
        ask(cache, 1)
        room = ROOM * cache.store.stats().payload_bytes
    known: dict[int, Tokens] = {}
    logits: dict[int, Tensor] = {}
    differ = []
    for order in range(orders):
        numbers = list(range(count))
        if order == 1:
            numbers.reverse()
        elif order:
            random.Random(order).shuffle(numbers)
        path, half = folder / str(order), count // 2
        for part in (numbers[:half], numbers[half:]):  # the store is closed and reopened between
            with opened(path, engine, room) as cache:
                through = through_langchain if order == 2 else through_service
                for number, (tokens, first) in zip(part, through(cache, part), strict=True):
                    if known.setdefault(number, tokens) != tokens:
                        differ.append((order, number))
                    if first is not None and not torch.equal(
                        logits.setdefault(number, first), first
                    ):
                        differ.append((order, number))
                evictions = cache.store.stats().evictions
                assert evictions > len(part) // 4, (evictions, len(part))
    assert differ == []


@pytest.mark.parametrize("codec", ["raw", "bfloat16"])
def test_no_order_changes_an_answer(tmp_path: Path, codec: str) -> None:
    check_orders(tmp_path, codec, 18, 3)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "cachegen"])
def test_nor_with_a_codec_that_loses_more(tmp_path: Path, codec: str) -> None:
    check_orders(tmp_path, codec, 40, 3)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["raw", "bfloat16"])
def test_no_order_of_1000_prompts_changes_an_answer(tmp_path: Path, codec: str) -> None:
    check_orders(tmp_path, codec, 1000, 5)
