"""The small world through a LangChain chain: the same answers as RagCache, in every mode.

The chain's messages have the layout of :meth:`RagCache.ask`: its instructions, and "Question:"
before the question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.runnables import RunnableLambda

from ragcache.blend import BLENDERS
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.template import SEPARATOR, SYSTEM
from ragcache.langchain import ChatRagCache, RagCacheRetriever, rag_messages
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.disk.store import DiskStore
from ragcache.types import Document


@pytest.fixture(scope="module")
def small_world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[RagCache]:
    folder = tmp_path_factory.mktemp("world")
    engine = TransformersEngine.load(str(tiny_model_dir))
    settings = Settings.load(ratio=0.15, max_tokens=8)
    with RagCache(engine, DiskStore(folder), HashEmbedder(), folder, settings) as cache:
        lines = world_file("documents.jsonl").read_text(encoding="utf-8").splitlines()
        cache.add(Document(**json.loads(line)) for line in lines[:24])
        yield cache


@pytest.fixture(scope="module")
def questions() -> list[str]:
    lines = world_file("questions.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [next(e["question"] for e in entries if e["kind"] == k) for k in ("direct", "split")]


@pytest.mark.parametrize("mode", [*BLENDERS, "reuse:positions=overlapping"])
def test_the_chain_answers_as_the_pipeline(
    small_world: RagCache, questions: list[str], mode: str
) -> None:
    retriever = RagCacheRetriever(store=small_world)
    model = ChatRagCache(store=small_world, mode=mode, instructions=SYSTEM + SEPARATOR)
    chain = (
        {"documents": retriever, "question": RunnableLambda("Question: {}".format)}
        | RunnableLambda(rag_messages)
        | model
    )
    for question in questions:
        small_world.ask(question, mode=mode)  # so that what it misses is there for both
        own = small_world.ask(question, mode=mode)
        answer = chain.invoke(question)
        report = answer.response_metadata["ragcache"]
        assert answer.text == own.text
        assert report["mode"] == own.report.mode
        assert report["reused_tokens"] == own.report.reused_tokens
        documents = [passage.chunk.document for passage in own.passages]
        assert [c["id"].partition("#")[0] for c in report["chunks"]] == documents


def test_several_questions_at_once(small_world: RagCache, questions: list[str]) -> None:
    asked = [
        rag_messages(question, [p.chunk.text for p in small_world.retrieve(question)])
        for question in questions
    ]
    model = ChatRagCache(store=small_world)
    alone = [model.invoke(messages).text for messages in asked]
    assert [answer.text for answer in model.batch([*asked, *asked])] == alone * 2
