"""Short texts of searched messages, between chunks, are chunks too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.blend import blender
from ragcache.core.generate import LocalGenerator
from ragcache.core.prompting import MIN_FOUND_TOKENS
from ragcache.core.request import PromptRequest, Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.disk.store import DiskStore
from ragcache.types import Part, Prompt, Sampling, Tokens
from tests import models, scene

LONG = scene.report(3)
SHORT = "The mill of Bexley stands on the river. " * 12  # more tokens than MIN_FOUND_TOKENS
BRIEF = "The mill is old."
CHAT = [
    {"role": "system", "content": f"Be kind. {SHORT}"},
    {"role": "user", "content": f"{LONG}\n\n{BRIEF}"},
    {"role": "assistant", "content": f"I read. {SHORT}"},
    {"role": "tool", "content": BRIEF},
    {"role": "system", "content": f"Be brief. {SHORT}"},
    {"role": "tool", "content": LONG.replace("Riverton", "Avon")},
    {"role": "user", "content": f"Where? {SHORT}"},
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    """In float32."""
    folder = tmp_path_factory.mktemp("store")
    template = folder / "chat.jinja"
    template.write_text(scene.CHATML)
    engine = models.engine(max_position_embeddings=8192)
    given = Settings.load(template=template, chat_bytes=0)
    path = folder / "store"
    with RagCache(engine, DiskStore(path), HashEmbedder(), path, given) as opened:
        yield opened


def built(cache: RagCache, messages: Sequence[dict[str, Any]], find: bool | None = None) -> Prompt:
    request = Request(messages=messages, chunks=(), find_chunks=find)
    prompt, _ = cache.prompts.build(request, [], cache.prompts.read(messages, find))
    return prompt


def reference(cache: RagCache, messages: Sequence[dict[str, Any]]) -> list[tuple[bool, Tokens]]:
    """The parts, made one after another from the rendered text: for texts of one kind."""
    tokenize = cache.engine.tokenize
    read = cache.prompts.read(messages, True)
    rendered = cache.engine.chat_template(scene.CHATML, None).render(read)
    segments = list(zip(rendered.segments, rendered.message_of, strict=True))
    found = [
        segment.kind == "chunk" and len(tokenize(segment.text)) >= MIN_FOUND_TOKENS
        for segment, _ in segments
    ]
    first, last = found.index(True), len(found) - 1 - found[::-1].index(True)
    kinds: list[tuple[Any, str]] = []  # what adjacent segments must share to be one part, and text
    for at, (segment, number) in enumerate(segments):
        own = segment.kind == "template"
        asks = at > last and number == segments[-1][1]
        if found[at]:
            kinds.append((("chunk", at), segment.text))
        elif own or asks or at < first:
            kinds.append((("text", number if at < first else None), segment.text))
        else:
            kinds.append((("short", number), segment.text))
    parts: list[tuple[bool, str]] = []
    for (kind, place), run in groupby(kinds, key=lambda each: each[0]):
        text = "".join(text for _, text in run)
        chunk = kind == "chunk" or (kind == "short" and len(tokenize(text)) >= MIN_FOUND_TOKENS)
        before = parts[-1] if parts and place is None or kind == "short" else None
        if before is not None and not chunk and not before[0]:
            parts[-1] = (False, before[1] + text)
        else:
            parts.append((chunk, text))
    return [(chunk, tokenize(text, control=not chunk)) for chunk, text in parts]


VARIANTS = {
    "all": CHAT,
    "without a question": CHAT[:-1],
    "a short question": [*CHAT[:-1], {"role": "user", "content": "Where?"}],
    "nothing short": [CHAT[1], CHAT[5], CHAT[6]],
    "texts around": [*CHAT[1:-1], {"role": "user", "content": f"{SHORT}\n\n{LONG}\n\n{SHORT}"}],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_are_those_of_the_reference(cache: RagCache, name: str) -> None:
    prompt = built(cache, VARIANTS[name])
    expected = reference(cache, VARIANTS[name])
    if expected[-1][0]:  # the last token of a last chunk is a text
        *expected, (_, last) = expected
        expected += [(True, last[:-1]), (False, last[-1:])]
    assert [(part.is_chunk, part.tokens) for part in prompt.parts] == expected


def test_texts_between_chunks_are_chunks(cache: RagCache) -> None:
    prompt, tokens = built(cache, CHAT), cache.engine.tokenize
    short = [tokens(CHAT[at]["content"]) for at in (2, 4)]
    assert all(text in prompt.chunks for text in short)
    assert all(len(chunk) >= MIN_FOUND_TOKENS for chunk in prompt.chunks)
    beginning, question = tokens(CHAT[0]["content"]), tokens(CHAT[6]["content"])
    assert beginning not in prompt.chunks and question not in prompt.chunks
    assert len(prompt.lead) == 1 and len(prompt.question) > len(question)
    marks = tokens("<|end|>\n<|tool|>\n", control=True)
    assert any(marks == text for text in prompt.texts)


def test_without_search_or_chunks_texts_stay_texts(cache: RagCache) -> None:
    assert not built(cache, CHAT, find=False).chunks
    assert not built(cache, [CHAT[0], CHAT[2], CHAT[6]]).chunks
    given: list[Any] = [{"type": "chunk", "text": BRIEF, "id": "mill"}, "Who?"]
    chat: list[dict[str, Any]] = [{"role": "user", "content": given}, *CHAT[2:4], CHAT[6]]
    assert len(built(cache, chat, find=False).chunks) == 1
    assert len(built(cache, chat).chunks) == 2


def test_only_what_was_edited_is_computed(cache: RagCache) -> None:
    """And the logits are full prefill's with everything recomputed."""

    def ask(chat: Sequence[dict[str, Any]], mode: str = "reuse") -> Any:
        request = Request(messages=chat, mode=mode, sampling=Sampling(max_tokens=1))
        stream = cache.generate(request)
        assert stream.answer.tokens
        stream.keep()
        return stream

    ask(CHAT)
    changed = [*CHAT[:3], {"role": "tool", "content": "The mill is new."}, *CHAT[4:]]
    report = ask(changed).answer.report
    assert {chunk.miss for chunk in report.chunks} == {None}
    texts = [part for part in report.parts if part.kind == "text" and not part.loaded]
    assert all(part.tokens < MIN_FOUND_TOKENS for part in texts[:-1])
    assert texts[-1].name == "question"
    stream = ask(changed, "fused:recompute_ratio=1.0")
    assert isinstance(cache.engine, TransformersEngine)
    full = cache.engine.prefill(stream.answer.prompt.tokens).logits
    torch.testing.assert_close(stream.first_logits, full, atol=1e-4, rtol=1e-4)


def test_an_answer_that_became_a_chunk_is_kept(tmp_path: Path) -> None:
    """All but its last token, whose KV was not computed when the answer was cut off there."""
    with scene.small(tmp_path) as cache:
        generator, tokens = cache.generator, tuple(range(10, 90))
        assert isinstance(generator, LocalGenerator)

        def ask(*parts: Part) -> Any:
            request = PromptRequest(
                Prompt(parts), blender("fused"), Sampling(max_tokens=1), is_chat=True
            )
            stream = generator.stream(request)
            assert stream.answer.tokens
            return stream

        start, question = Part((1, 5, 9)), Part((100, 101))
        ask(start, Part(tokens[:-1]))
        stream = ask(start, Part(tokens, True), question)
        report = stream.answer.report
        assert report.kept_tokens == len(start.tokens) + len(tokens) - 1
        assert (report.reused_tokens, report.recomputed_tokens) == (len(tokens) - 1, 1)
        (chunk,) = report.chunks
        assert (chunk.tokens, chunk.recomputed, chunk.miss) == (len(tokens), 1, None)
        assert sum(count > 0 for count in report.computed) == 1 + len(question.tokens)
        assert isinstance(cache.engine, TransformersEngine)
        full = cache.engine.prefill((*start.tokens, *tokens, *question.tokens)).logits
        torch.testing.assert_close(stream.first_logits, full, atol=1e-4, rtol=1e-4)
        other = ask(start, Part((*tokens[:60], 7, *tokens[61:]), True), question).answer.report
        assert other.kept_tokens == 0  # no part of an edited chunk
        assert other.loaded_text_tokens == len(start.tokens)
