"""End to end on a pretrained model, SmolLM2-135M-Instruct, and real text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from bench.chat_turns import AnsweringService, rendered
from ragcache.api.scheduler import Scheduler
from ragcache.engine.base import Engine
from ragcache.errors import ModelError
from ragcache.models import SMOLLM2, model_path
from ragcache.models.gguf import converted_folder
from ragcache.rag import RagCache
from ragcache.settings import ServiceSettings, Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.types import Document
from tests.api.conftest import serving

# Speeches and laws of the United States, which are in the public domain.
DOCUMENTS = [
    Document(
        "gettysburg",
        "Gettysburg Address, Abraham Lincoln, 1863. Four score and seven years ago our fathers "
        "brought forth on this continent, a new nation, conceived in Liberty, and dedicated to the "
        "proposition that all men are created equal. Now we are engaged in a great civil war, "
        "testing whether that nation, or any nation so conceived and so dedicated, can long "
        "endure. We are met on a great battle-field of that war.",
    ),
    Document(
        "constitution",
        "Constitution of the United States, 1787. We the People of the United States, in Order to "
        "form a more perfect Union, establish Justice, insure domestic Tranquility, provide for "
        "the common defence, promote the general Welfare, and secure the Blessings of Liberty to "
        "ourselves and our Posterity, do ordain and establish this Constitution.",
    ),
    Document(
        "alaska",
        "Treaty concerning the cession of Alaska, 1867. In consideration of the cession aforesaid, "
        "the United States agree to pay at the treasury in Washington seven million two hundred "
        "thousand dollars in gold to the diplomatic representative of the Emperor of all the "
        "Russias, duly authorized to receive the same.",
    ),
]
QUESTION = "How many dollars did the United States agree to pay for Alaska?"
ANSWER = "seven million two hundred thousand dollars"


@pytest.fixture(scope="module")
def file() -> Path:
    """The model's file. It is converted into the user's cache, once for all runs."""
    pytest.importorskip("gguf", reason="needs the extra gguf")
    try:
        return Path(model_path(SMOLLM2))
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def path(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the documents."""
    path = tmp_path_factory.mktemp("smollm2")
    with RagCache.open(path, SMOLLM2) as cache:
        added = cache.add(DOCUMENTS)
        assert (added.documents, added.precomputed.encoded) == (3, added.chunks + 1)
    return path


@pytest.fixture(scope="module")
def cache(path: Path) -> Iterator[RagCache]:
    """The store, opened again without naming the model, with greedy answers."""
    settings = Settings.load(max_tokens=16, top_k=3, ratio=0.15)
    with RagCache.open(path, settings=settings) as cache:
        yield cache


def test_every_mode_answers_from_the_documents(cache: RagCache) -> None:
    assert Catalog(cache.store).get_setting("model") == "smollm2"
    full, fused, reuse = (cache.ask(QUESTION, mode=mode) for mode in ("full", "fused", "reuse"))
    for answer in (full, fused, reuse):
        assert answer.report.fallbacks == () and len(answer.passages) == 3
        assert answer.prompt.tokens == full.prompt.tokens
    assert ANSWER in full.text
    assert full.report.reused_tokens == 0 and full.report.charged_budget == 1
    assert reuse.report.reused_tokens == reuse.report.chunk_tokens > 200
    assert reuse.report.recomputed_tokens == 0 < fused.report.recomputed_tokens
    assert fused.report.reused_tokens > reuse.report.reused_tokens * 0.7
    assert reuse.report.charged_budget < fused.report.charged_budget < 0.35


def test_fused_is_nearer_to_full_prefill_than_reuse(cache: RagCache) -> None:
    divergence = {}
    for mode in ("full", "fused", "reuse"):
        stream = cache.stream(QUESTION, mode=mode)
        assert stream.answer.tokens
        divergence[mode] = stream.first_logits.float().log_softmax(-1)
    full = divergence.pop("full")
    kl = {mode: (full.exp() * (full - other)).sum().item() for mode, other in divergence.items()}
    assert 0 < kl["fused"] < kl["reuse"] < 0.2


def test_ratio_1_is_full_prefill_which_is_that_of_transformers(cache: RagCache) -> None:
    full, fused = cache.ask(QUESTION, mode="full"), cache.ask(QUESTION, mode="fused", ratio=1)
    assert fused.tokens == full.tokens
    assert isinstance(cache.engine, Engine)
    model: Any = getattr(cache.engine, "model")  # noqa: B009  (of TransformersEngine)
    prompt = torch.tensor([full.prompt.tokens])
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert tuple(expected[0, prompt.shape[1] :].tolist())[: len(full.tokens)] == full.tokens


def test_an_unmodified_client_reuses_its_chat(cache: RagCache, tmp_path: Path) -> None:
    """The documents stand in the first question, as people paste them."""
    settings = Settings.load(store=tmp_path, ratio=0.15)
    own = RagCache.open(tmp_path, settings=settings, beside=cache)
    own.add(DOCUMENTS)
    service = AnsweringService(own, Scheduler(), settings=ServiceSettings.load(port=0))
    pasted = "\n\n".join(document.text for document in DOCUMENTS)
    messages: Any = [{"role": "system", "content": "You are a historian. Answer briefly."}]
    with serving(service, ()) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        for turn, question in enumerate((f"{pasted}\n\n{QUESTION}", "In which year?", "To whom?")):
            messages.append({"role": "user", "content": question})
            answer = client.chat.completions.create(
                model="ragcache", messages=messages, max_tokens=16
            )
            assert text_of_prompt(service) == rendered(cache.engine, messages, ())
            usage = answer.usage
            assert usage is not None and usage.prompt_tokens_details is not None
            share = (usage.prompt_tokens_details.cached_tokens or 0) / usage.prompt_tokens
            assert share >= (0.9 if turn else 0.6)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        client.close()
    assert ANSWER in messages[2]["content"]


def text_of_prompt(service: AnsweringService) -> str:
    """Of the latest answer."""
    return "".join(service.default_cache.engine.pieces(service.answer.prompt.tokens))


@pytest.mark.slow
def test_every_number_is_the_one_that_transformers_loads(file: Path) -> None:
    from tests.models.test_gguf import check_equal

    check_equal(file, converted_folder(file))
