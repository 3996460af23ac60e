"""Chat templates cut into prefix, chunks and question whose ids concatenate exactly."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ragcache.engine import template as template_module
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.plain_text import PlainText
from ragcache.engine.template import SYSTEM, split_chat_template
from ragcache.errors import ModelError, PromptError
from tests import models

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}<model>"
)
DROPS_SYSTEM = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}U:{{ m.content }}{% endfor %}A:"
)
TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """These templates end: no process is started to see that."""
    monkeypatch.setattr(template_module, "check_rendering", lambda *_: None)


def with_template(template: str | None) -> tuple[Any, Any]:
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.chat_template = template

    def tokenize(text: str, *, control: bool = False) -> tuple[int, ...]:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not control)
        return tuple(encoded["input_ids"])

    return tokenizer, tokenize


@pytest.mark.parametrize("template", [None, CHATML, TRIMS, NO_SYSTEM, DROPS_SYSTEM])
def test_parts_concatenate_to_the_prompt(template: str | None) -> None:
    tokenizer, tokenize = with_template(template)
    parts = split_chat_template(tokenizer, tokenize)
    chunks = ["The river Avon runs.", "  Mira plays the cello. "]
    prompt = parts.prompt(chunks, "Where does she live?")
    assert prompt.tokens == prompt.prefix + prompt.chunks[0] + prompt.chunks[1] + prompt.question
    assert [prompt.tokens[a:b] for a, b in prompt.spans] == list(prompt.chunks)
    assert prompt.tokens[prompt.question_start :] == prompt.question
    assert prompt.tokens[0] == tokenizer.bos_token_id
    text = tokenizer.decode(prompt.tokens)
    assert SYSTEM in text
    assert "runs.\n\nMira plays the cello.\n\nQuestion: Where does she live?" in text
    if template:
        messages = [{"role": "user", "content": "x"}]
        ending = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.endswith(ending[ending.rindex("x") + 1 :])


def test_a_chunk_has_the_same_ids_in_every_prompt() -> None:
    parts = split_chat_template(*with_template(CHATML))
    alone = parts.prompt(["one"], "q").chunks[0]
    assert parts.prompt(["two", "one", "three"], "other").chunks[1] == alone == parts.chunk("one")


def test_text_cannot_make_control_tokens() -> None:
    tokenizer, tokenize = with_template(CHATML)
    parts = split_chat_template(tokenizer, tokenize)
    prompt = parts.prompt(["Stop here.<eos> <bos>"], "And<eos> here?")
    assert tokenizer.eos_token_id not in prompt.tokens
    assert prompt.tokens.count(tokenizer.bos_token_id) == 1
    assert "And<eos> here?" in tokenizer.decode(prompt.question)


ADDED = [
    AddedToken("<tool_call>", special=False),
    AddedToken("<note>", special=False, normalized=True),
    AddedToken("<|im_end|>", special=True),
    AddedToken("\n\n\n", special=False),  # text, as in Gemma's and Phi's tokenizers
]


@pytest.fixture
def with_added() -> Any:
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.add_tokens(ADDED)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_text_cannot_make_added_tokens_that_are_not_special(with_added: Any) -> None:
    engine = TransformersEngine(models.model("llama"), with_added, name="llama")
    names = [token.content for token in ADDED[:3]]
    control = set(with_added.convert_tokens_to_ids(names))
    text = f"Say <tool_call>x <note>y <|im_end|>{' '.join(names)}"
    prompt = engine.template.prompt([text], text, text)
    assert not control & {*prompt.chunks[0]}
    own = engine.tokenize(engine.template.after, control=True)
    asked = prompt.question[: -len(own)]
    assert not control & {*asked} and prompt.question[-len(own) :] == own
    assert with_added.decode(asked).count("<tool_call>") == 4
    assert control & {*engine.tokenize(text, control=True)}


def test_ids_of_other_text_stay_as_they_were(with_added: Any) -> None:
    plain = PlainText(with_added, "llama")
    for text in ("one\n\n\n\ntwo  three\t", "na\u00efve <b> \U0001f600", *models.TEXT):
        own = with_added(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert plain.tokens(text) == tuple(own)
    assert with_added.convert_tokens_to_ids("\n\n\n") in plain.tokens("one\n\n\ntwo")


def test_a_vocabulary_that_has_control_tokens_as_words_is_refused() -> None:
    words = WordLevel({"<unk>": 0, "say": 1, "<tool_call>": 2}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert PlainText(tokenizer, "words").tokens("say what") == (1, 0)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    with pytest.raises(ModelError, match="makes the control token '<tool_call>' from plain text"):
        PlainText(tokenizer, "words")


def test_added_tokens_whose_ids_leave_gaps_are_refused() -> None:
    backend = SimpleNamespace(
        model=WordLevel({"<unk>": 0, "say": 1}, unk_token="<unk>"),
        normalizer=None,
        pre_tokenizer=WhitespaceSplit(),
        get_added_tokens_decoder=lambda: {9: AddedToken("<tool_call>")},
    )
    tokenizer = SimpleNamespace(backend_tokenizer=backend, unk_token_id=0)
    with pytest.raises(ModelError, match="added tokens leave gaps"):
        PlainText(tokenizer, "words")


@pytest.mark.parametrize("template", [TWICE, SHOUTS])
def test_templates_that_change_the_text_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match="changes, drops or repeats the user's text"):
        split_chat_template(*with_template(template))


def test_empty_parts_are_refused() -> None:
    parts = split_chat_template(*with_template(None))
    with pytest.raises(PromptError, match="the question is empty"):
        parts.prompt(["one"], " \n")
    with pytest.raises(PromptError, match="a chunk is empty"):
        parts.prompt(["one", " "], "q")


def test_prompts_beyond_the_context_are_refused() -> None:
    engine = models.engine("llama", max_position_embeddings=64)
    with pytest.raises(PromptError, match="70 tokens, but llama has a context of 64"):
        engine.prefill(tuple(range(3, 63)), room=10)
    with pytest.raises(PromptError, match="a chunk and its context"):
        engine.encode([tuple(range(3, 73))])
    with pytest.raises(PromptError, match="no tokens"):
        engine.encode([()])
