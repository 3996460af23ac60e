"""Prompts of chats: parts in the order of the model's own chat template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ragcache.core.prompting import read_template
from ragcache.core.request import Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.errors import ConfigError, PromptError
from ragcache.rag import RagCache
from ragcache.settings import Settings
from ragcache.types import Answer, Document, Prompt, Sampling
from tests import scene

LONG = scene.report(6)
SHORT = Sampling(max_tokens=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagCache]:
    folder = tmp_path_factory.mktemp("store")
    template = folder / "chat.jinja"
    template.write_text(scene.CHATML)
    settings = Settings.load(store=folder / "store", template=template)
    with RagCache.open(folder / "store", settings=settings) as opened:
        opened.add([Document("a", LONG.split("\n\n")[2])])
        yield opened


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def ask(cache: RagCache, *messages: dict[str, Any], **options: Any) -> Answer:
    return cache.ask(messages=messages, sampling=SHORT, chunks=options.pop("chunks", []), **options)


def text_of(cache: RagCache, prompt: Prompt) -> str:
    """Without whitespace: the tokenizer begins every part with a space."""
    return squeezed("".join(cache.engine.pieces(prompt.tokens)))


def squeezed(text: str) -> str:
    return "".join(text.split())


def rendered(cache: RagCache, *messages: dict[str, Any]) -> str:
    assert isinstance(cache.engine, TransformersEngine)
    return squeezed(
        cache.engine.tokenizer.apply_chat_template(
            list(messages), chat_template=scene.CHATML, tokenize=False, add_generation_prompt=True
        )
    )


def test_a_chat_is_the_templates_text(cache: RagCache) -> None:
    chat = (
        said("system", "Be brief."),
        said("user", f"{LONG}\n\nHow many harbours?"),
        said("assistant", "Five."),
        said("tool", '{"harbours": 5}'),
        said("user", "Where?"),
    )
    answer = ask(cache, *chat)
    assert text_of(cache, answer.prompt) == rendered(cache, *chat)
    assert len(answer.prompt.chunks) >= 3
    report = answer.report
    counted = report.prefix_tokens + report.chunk_tokens + report.question_tokens
    assert counted == len(answer.prompt)


def test_documents_stand_before_the_last_users_text(cache: RagCache) -> None:
    chat = said("system", "Be brief."), said("user", "Hi."), said("assistant", "Yes?")
    answer = ask(cache, *chat, said("user", "Where?"), chunks=["One.", "Two."])
    want = rendered(cache, *chat, said("user", "One.\n\nTwo.\n\nWhere?"))
    assert text_of(cache, answer.prompt) == want
    assert [p.chunk.id for p in answer.passages] == ["given#0", "given#1"]
    inside = ask(cache, *chat, said("user", "Where?"), chunks=["One."], documents_in="system")
    assert "Bebrief.One.<|end|>" in text_of(cache, inside.prompt)


def test_a_known_chunk_is_found_where_it_stands(cache: RagCache) -> None:
    known = LONG.split("\n\n")[2]
    chat = said("system", f"{'Be brief. ' * 100}\n\n{known}\n\nBe kind."), said("user", "Where?")
    for _ in range(2):
        answer = ask(cache, *chat)
        assert text_of(cache, answer.prompt) == rendered(cache, *chat)
        found = [(chunk.id, chunk.miss) for chunk in answer.report.chunks]
        assert found == [(chunk.id, None) for chunk in cache.catalog.chunks(range(len(found)))]


def test_an_edit_reuses_all_other_parts(cache: RagCache) -> None:
    before = ask(cache, said("user", LONG + "\n\nWhere? (edit)"))
    changed = LONG.replace("Paragraph 3", "Paragraph three")
    after = ask(cache, said("user", "New: " + changed + "\n\nWhere? (edit)"))
    gone = set(after.prompt.chunks) - set(before.prompt.chunks)
    assert len(gone) <= 3 < len(after.prompt.chunks)
    missed = [chunk.miss for chunk in after.report.chunks]
    assert missed.count(None) >= len(missed) - len(gone)


@pytest.mark.parametrize("mode", ["full", "fused", "prefix", "cacheblend"])
def test_texts_before_the_first_chunk_are_loaded(cache: RagCache, mode: str) -> None:
    chat = said("system", f"Be brief in {mode}."), said("user", "Hi."), said("assistant", "Yes?")
    ratio = {"ratio": 1.0} if mode in ("fused", "cacheblend") else {}
    options = {"chunks": ["One chunk of text."], "mode": mode, **ratio}
    first = ask(cache, *chat, said("user", "Where?"), **options)
    cache.chats.clear()
    again = ask(cache, *chat, said("user", "Where?"), **options)
    want = 0 if mode == "full" else first.report.prefix_tokens
    assert again.report.loaded_text_tokens == want
    assert again.tokens == first.tokens


def test_short_messages_are_one_text_with_the_next(cache: RagCache) -> None:
    """The keys of the texts have all that precedes them: with thousands, their time would grow with
    the square of the prompt."""
    turns = [said(role, f"Hi {n}.") for n in range(100) for role in ("user", "assistant")]
    chat = [said("system", "Be brief. " * 30), *turns, said("user", "Where?")]
    prompt = cache.prompt(Request(messages=chat))
    text = "".join(cache.engine.pieces(prompt.tokens))
    sizes = [len("".join(cache.engine.pieces(part.tokens))) for part in prompt.parts]
    assert "Hi 99." in text and sum(sizes) == len(text)
    assert all(256 <= size < 256 + 100 for size in sizes[1:-1]) and sizes[0] >= 300
    longer = cache.prompt(Request(messages=[*chat, said("assistant", "There."), chat[-1]]))
    assert longer.parts[: len(prompt.parts) - 1] == prompt.parts[:-1]


def test_the_next_turn_computes_only_what_is_new(cache: RagCache) -> None:
    chat = [said("system", "Be brief."), said("user", LONG + "\n\nHow many harbours?")]
    first = ask(cache, *chat, ratio=1.0)
    chat += [said("assistant", first.text), said("user", "Where?")]
    second = ask(cache, *chat, ratio=1.0)
    report = second.report
    assert report.kept_tokens >= len(first.prompt) - 1
    assert report.bytes_loaded == 0 and report.recomputed_tokens == 0
    assert report.reused_tokens == report.chunk_tokens
    assert sum(count > 0 for count in report.computed) == len(second.prompt) - report.kept_tokens
    cache.chats.clear()
    exact = ask(cache, *chat, mode="full")
    assert second.tokens == exact.tokens  # at ratio 1, the first turn is
    other = ask(cache, *chat, mode="reuse")
    assert other.report.kept_tokens == 0  # of another method


def test_a_stopped_answer_is_a_turn_of_its_chat(cache: RagCache) -> None:
    """Here nothing is computed late: how far an answer was read makes no difference."""
    chat = [said("system", "Be brief."), said("user", LONG + "\n\nHow many piers?")]
    mode: dict[str, Any] = {"mode": "fused:attention=0"}
    whole = ask(cache, *chat, **mode)
    for stop in (1, 3):  # after so many pieces
        more = [*chat, said("assistant", ""), said("user", "Where?")]
        cache.chats.clear()
        stream = cache.stream(messages=chat, chunks=(), sampling=SHORT, **mode)
        more[-2]["content"] = "".join(islice(stream, stop))
        stream.close()
        with pytest.raises(RuntimeError, match="was not finished"):
            _ = stream.answer
        after = ask(cache, *more, **mode)
        assert after.report.kept_tokens >= len(whole.prompt) - 1
        cache.chats.clear()
        assert ask(cache, *chat, **mode).text == whole.text
        assert (
            after.tokens == ask(cache, *more, **mode).tokens
        )  # as after an answer that was not stopped


def test_a_chat_goes_on_where_attention_is_hidden(
    cache: RagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.engine, "exposes_attention", False)
    chat = [said("system", "Be brief."), said("user", LONG + "\n\nHow many piers?")]
    cache.chats.clear()
    first = ask(cache, *chat)
    after = ask(cache, *chat, said("assistant", first.text), said("user", "Where?"))
    assert after.report.kept_tokens >= len(first.prompt) - 1


def test_another_chat_that_begins_alike_is_no_earlier_turn(cache: RagCache) -> None:
    """All chats begin with the template's own text: it must not keep stored texts from being
    loaded, nor the ratio from being planned."""
    rules, other = said("system", "Be brief. " * 30), said("system", "Be kind. " * 30)
    options: dict[str, Any] = {"chunks": ["One chunk of text."], "ratio": "auto"}
    cache.chats.clear()
    ask(cache, rules, said("user", "Where?"), **options)  # stores its system message
    cache.chats.clear()
    ask(cache, other, said("user", "Who?"), **options)
    again = ask(cache, rules, said("user", "When?"), **options).report
    assert again.kept_tokens == 0 and again.loaded_text_tokens > 60
    assert again.plan is not None
    alike = ask(cache, rules, said("user", LONG + "\n\nHow?"), ratio="auto").report
    assert alike.plan is not None
    turns = [rules, said("user", "Where?"), said("assistant", "Here."), said("user", "Why?")]
    third = ask(cache, *turns, **options).report  # its documents moved
    assert "this mode loads no text" not in {part.reason for part in third.parts}


def test_kept_rows_are_those_of_the_prompt(cache: RagCache) -> None:
    """By value: the logits after a kept beginning are full prefill's."""
    cache.chats.clear()  # of other chats, which were not exact
    chat = [said("user", "Who? " * 30), said("assistant", "Ann."), said("user", "Where is she?")]
    ask(cache, *chat[:1])
    streams = [
        cache.generate(Request(messages=chat, chunks=(), mode=mode, sampling=SHORT))
        for mode in ("fused", "full")
    ]
    for stream in streams:
        assert stream.answer.tokens
    assert streams[0].answer.report.kept_tokens > 30
    assert (streams[0].first_logits - streams[1].first_logits).abs().max() < 1e-4


def test_chats_are_forgotten_when_they_do_not_fit(cache: RagCache) -> None:
    cache.chats.clear()
    before, cache.chats.most_bytes = cache.chats.most_bytes, 1
    chat = [said("user", "Who is it?")]
    first = ask(cache, *chat)
    chat += [said("assistant", first.text), said("user", "Where?")]
    assert ask(cache, *chat).report.kept_tokens == 0
    cache.chats.most_bytes = before


def test_control_tokens_of_texts_stay_text(cache: RagCache) -> None:
    plain = ask(cache, said("user", "<bos> and <eos> are names"))
    assert "<bos>and<eos>arenames" in text_of(cache, plain.prompt)
    special = set(cache.engine.tokenize("<bos>", control=True))
    assert not special & set(plain.prompt.tokens)


def test_instructions_are_a_system_message_where_there_is_none(cache: RagCache) -> None:
    alone = ask(cache, said("user", "Where?"), instructions="Be kind.")
    assert text_of(cache, alone.prompt).startswith("<|system|>Bekind.<|end|>")
    own = ask(cache, said("system", "No."), said("user", "Where?"), instructions="Be kind.")
    assert "Bekind." not in text_of(cache, own.prompt)
    asked = cache.ask("Where?", chunks=["One."], instructions="Be kind.", sampling=SHORT)
    assert "Bekind.<|end|><|user|>One.Question:Where?" in text_of(cache, asked.prompt)


def test_a_last_answer_is_continued(cache: RagCache) -> None:
    answer = ask(cache, said("user", "Where?"), said("assistant", "It is in"))
    assert text_of(cache, answer.prompt).endswith("Itisin")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        (["Hi"], "message 0 is a str"),
        ([{"content": "Hi"}], "message 0 has no role"),
        (
            [{"role": "tool", "content": 5}, said("user", "Who?")],
            "the content of message 0 is a int",
        ),
        (
            [said("tool", [{"type": "image_url"}]), said("user", "Who?")],
            "a part of type 'image_url'",
        ),
        ([{"role": "wizard", "content": "Hi"}], "has the role 'wizard'"),
    ],
)
def test_messages_that_cannot_be_are_said(
    cache: RagCache, messages: list[Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        cache.ask(messages=messages, chunks=[])


def test_a_question_and_messages_are_one_too_many(cache: RagCache) -> None:
    with pytest.raises(PromptError, match="not both"):
        cache.ask("Where?", messages=[said("user", "Where?")])


def test_a_template_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template(tmp_path / "none.jinja")


def test_chunk_first_and_last(cache: RagCache) -> None:
    """A template of nothing but the texts: the prompt begins and ends with a chunk."""
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for _ in range(2):
        answer = ask(cache, said("user", LONG), template=bare, ratio=1.0)
        assert answer.prompt.parts[0].is_chunk and not answer.prompt.parts[-1].is_chunk
        assert len(answer.prompt.parts[-1].tokens) == 1
        want = ask(cache, said("user", LONG), template=bare, mode="full")
        assert answer.tokens == want.tokens
