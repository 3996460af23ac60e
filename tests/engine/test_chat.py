"""Chats as chat templates render them, to the character, in segments."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from ragcache.engine import chat as chat_module
from ragcache.engine import rendering
from ragcache.engine.chat import ChatTemplate, RenderedChat
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.template import SEPARATOR, SYSTEM, split_chat_template
from ragcache.errors import ConfigError, ModelError, PromptError
from ragcache.models.packaged import TINY, packaged_path
from ragcache.types import Segment
from tests import models

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '')"
    " + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DOCUMENTS = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}"
    "<|im_end|>\n{% set messages = messages[1:] %}{% endif %}"
    "{% for d in documents or [] %}{{ '<|im_start|>document {\"id\": \"' + d['doc_id'] | string"
    " + '\"}\n' + d['text'] + '<|im_end|>\n' }}{% endfor %}" + CHATML
)
DOCUMENTS_IN_JSON = (
    "{% if documents %}<results>{% for d in documents %}{{ d | tojson }}\n{% endfor %}</results>"
    "{% endif %}" + CHATML
)
DOCUMENTS_WITH_TITLES = (
    "{% for d in documents or [] %}{{ 'Title: ' + d.title + '\n' + d['contents'] + '\n\n' }}"
    "{% endfor %}" + CHATML
)
DATED = "<|im_start|>Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML
THINKS = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>{{ m.content | tojson }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    " {{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
REPEATS = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")
LOWERS = CHATML.replace("{{ m.content }}", "{{ m.content | lower }}")
REPLACES = CHATML.replace("{{ m.content }}", "{{ m.content | replace('\n', ' / ') }}")
REORDERS = "{% for m in messages | reverse %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
RELATED = "{% set o = messages[0].content[:3] %}" + CHATML.replace("\n{{ m", "\n{{ o }}{{ m")
ADDS = CHATML.replace("{{ m.content }}", "{{ m.content | replace('a', '<|im_end|>') }}")

ALL = {
    name: source
    for name, source in list(globals().items())
    if name.isupper() and isinstance(source, str) and name not in ("SYSTEM", "SEPARATOR", "TINY")
} | {"PLAIN": None}

ADDED = ["<|im_start|>", "<|im_end|>", "<tool_call>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module")
def base() -> Any:
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ADDED])
    return tokenizer


@pytest.fixture
def template(base: Any) -> Callable[..., ChatTemplate]:
    def make(own: str | dict[str, str] | None, **options: Any) -> ChatTemplate:
        tokenizer = copy.copy(base)
        tokenizer.chat_template = own
        return ChatTemplate(tokenizer, **options)

    return make


def chat(*turns: str | tuple[Segment, ...]) -> list[ChatMessage]:
    """A chat of a system message and turns of user and assistant."""
    roles = ["system", *["user", "assistant"] * len(turns)]
    return [
        ChatMessage.of(role, turn) if isinstance(turn, str) else ChatMessage(role, turn)
        for role, turn in zip(roles, turns, strict=False)
    ]


def of_transformers(template: ChatTemplate, messages: Sequence[ChatMessage], **options: Any) -> str:
    """The text that transformers renders."""
    continued = messages[-1].role == "assistant"
    rendered = template.tokenizer.apply_chat_template(
        [{**m.fields, "role": m.role, "content": m.text} for m in messages],
        chat_template=template._source(),
        tokenize=False,
        continue_final_message=continued,
        add_generation_prompt=not continued,
        **options,
    )
    return str(rendered)


def kinds(rendered: RenderedChat) -> list[tuple[str, str]]:
    return [(segment.kind[:2], segment.text) for segment in rendered.segments]


def chunks(rendered: RenderedChat) -> list[Segment]:
    return [segment for segment in rendered.segments if segment.kind == "chunk"]


ONE = Segment("The river Avon runs.\n\n", "chunk", "a#0")
TWO = Segment("Mira plays.\n\n", "chunk", "b#0")


@pytest.mark.parametrize("name", ["CHATML", "LLAMA2", "DATED", "THINKS", "TOOLS", "REORDERS"])
def test_segments_are_what_the_template_renders(name: str, template: Any) -> None:
    made = template(ALL[name])
    messages = chat(" Be brief. ", (Segment("\nRead:\n"), ONE, TWO, Segment("Where? ")), "A", "b\n")
    rendered = made.render(messages)
    assert rendered.text == of_transformers(made, messages)
    assert chunks(rendered) == [ONE, TWO]
    assert all("<|im" not in s.text for s in rendered.segments if s.kind != "template")
    owners = {
        s.text.strip(): m for s, m in zip(rendered.segments, rendered.message_of, strict=True)
    }
    assert [owners[text] for text in ("Be brief.", "Read:", "Where?", "A", "b")] == [0, 1, 1, 2, 3]


def test_text_of_the_template_belongs_to_the_message_before_it(template: Any) -> None:
    rendered = template(CHATML).render(chat("S", "Q"))
    assert kinds(rendered) == [
        ("te", "<|im_start|>system\n"),
        ("te", "S"),
        ("te", "<|im_end|>\n<|im_start|>user\n"),
        ("te", "Q"),
        ("te", "<|im_end|>\n<|im_start|>assistant\n"),
    ]
    assert [segment.kind for segment in rendered.segments] == ["template", "text"] * 2 + [
        "template"
    ]
    assert rendered.message_of == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("name", ["LLAMA2", "GEMMA"])
def test_a_chunk_that_is_trimmed_is_the_beginning_of_the_stored_one(
    name: str, template: Any
) -> None:
    made = template(ALL[name])
    messages = [ChatMessage("user", (Segment(" \n "), ONE, TWO))]
    rendered = made.render(messages)
    assert rendered.text == of_transformers(made, messages)
    assert chunks(rendered) == [ONE, Segment("Mira plays.", "chunk", "b#0", TWO.text)]
    assert chunks(made.render([ChatMessage("user", (Segment(" "), TWO))]))[0].stored == TWO.text
    spaced = Segment("\t x\n", "chunk")
    assert chunks(made.render([ChatMessage("user", (spaced,))]))[0].stored is None


def test_documents_are_placed_before_the_last_user_message(template: Any) -> None:
    made = template(CHATML)
    placed = made.render(chat("S", "Q", "A", "R"), [ONE, TWO])
    content = (ONE, TWO, Segment("R"))
    assert placed == made.render(chat("S", "Q", "A", content))
    system = made.render(chat("S", "Q"), [ONE], documents_in="system")
    assert system == made.render(chat((Segment("S"), Segment(SEPARATOR), ONE), "Q"))
    alone = made.render(chat("S", "Q")[1:], [ONE], documents_in="system")
    assert alone == made.render(chat((ONE,), "Q")) and alone.message_of[-1] == 1
    with pytest.raises(PromptError, match="2 documents cannot be placed before the last user mess"):
        made.render([ChatMessage.of("system", "S")], [ONE, TWO])


@pytest.mark.parametrize("name", ["DOCUMENTS", "DOCUMENTS_WITH_TITLES"])
def test_a_template_that_reads_documents_places_them(name: str, template: Any) -> None:
    made = template(ALL[name])
    messages = chat("S", "Q")
    rendered = made.render(messages, [ONE, TWO])
    key = "text" if name == "DOCUMENTS" else "contents"
    documents = [
        {key: one.text.strip(), "doc_id": n, "title": ""} for n, one in enumerate([ONE, TWO], 1)
    ]
    assert rendered.text == of_transformers(made, messages, documents=documents)
    stored = [(one.text, one.stored) for one in chunks(rendered)]
    assert stored == [(one.text.strip(), one.text) for one in (ONE, TWO)]
    assert made.render(messages).text == of_transformers(made, messages)


def test_documents_in_json_stay_chunks(template: Any) -> None:
    made = template(DOCUMENTS_IN_JSON)
    quotes = Segment('He said "no",\nand left.\n\n', "chunk", "c#0")
    rendered = made.render(chat("S", "Q"), [ONE, quotes])
    documents = [{"text": one.text.strip()} for one in (ONE, quotes)]
    assert rendered.text == of_transformers(made, chat("S", "Q"), documents=documents)
    assert chunks(rendered)[1] == Segment('He said \\"no\\",\\nand left.', "chunk", "c#0")


def test_the_documents_template_of_several_is_taken(template: Any) -> None:
    made = template({"default": CHATML, "rag": DOCUMENTS, "tool_use": TOOLS})
    assert made.render(chat("S", "Q"), [ONE]) == template(DOCUMENTS).render(chat("S", "Q"), [ONE])
    tools = [{"name": "f"}]
    expected = template(TOOLS).render(chat("S", "Q"), tools=tools)
    assert made.render(chat("S", "Q"), tools=tools) == expected


def test_documents_that_a_template_does_not_write_are_an_error(template: Any) -> None:
    counts = "{{ documents | length }}" + CHATML
    with pytest.raises(PromptError, match="has the variable documents, but writes none"):
        template(counts).render(chat("S", "Q"), [ONE])
    first = "{% if documents %}{{ documents[0].text }}{% endif %}" + CHATML
    with pytest.raises(PromptError, match="text of document 2 of 2 0 times, where it must be once"):
        template(first).render(chat("S", "Q"), [ONE, TWO])
    strict = "{% if documents %}{{ documents[0]['passage'] + '' + 1 }}{% endif %}" + CHATML
    with pytest.raises(PromptError, match="has the variable documents, but writes none"):
        template(strict).render(chat("S", "Q"), [ONE])


def test_the_date_is_the_given_day(template: Any) -> None:
    rendered = template(DATED, day=date(2001, 2, 3)).render(chat("S", "Q"))
    assert rendered.segments[0].text.startswith("<|im_start|>Today is 03 February 2001.")
    assert rendered.segments[0].kind == "template"


def test_reasoning_that_a_template_drops_is_missing(template: Any) -> None:
    made = template(THINKS)
    answer = "<think>\nLet me think about it for a while.\n</think>\n\nBlue."
    answers = [answer, "no reasoning", answer.replace("Blue", "<|im_end|>Red"), answer]
    turns = [text for n, one in enumerate(answers) for text in (f"Q{n}", one)]
    messages = chat("S", *turns[:-1], (ONE, Segment("Last")))
    for some in (messages, messages[1:], chat("S", "Q", answer, "R")):
        rendered = made.render(some)
        assert rendered.text == of_transformers(made, some)
        texts = [segment.text for segment in rendered.segments if segment.kind == "text"]
        assert "Blue." in texts and not any("Let me" in text for text in texts)
    assert "<|im_end|>Red." in [s.text for s in made.render(messages).segments if s.kind == "text"]
    assert (
        chunks(made.render(chat("S", "Q", (Segment("<think>"), ONE, Segment("</think>a")), "R")))
        == []
    )


def test_a_text_that_is_changed_is_one_text(template: Any) -> None:
    for source in (LOWERS, REPLACES):
        made = template(source)
        messages = chat("s", "q", (Segment("Read "), ONE, Segment("NOW")), (TWO,))
        rendered = made.render(messages)
        assert rendered.text == of_transformers(made, messages)
        owned = zip(rendered.segments, rendered.message_of, strict=True)
        changed = [segment for segment, message in owned if message == 2]
        assert [segment.kind for segment in changed] == ["text", "template"]
        assert changed[0].text.lower().startswith("read the river avon")


def test_what_a_template_drops_or_repeats_is_an_error(template: Any) -> None:
    with pytest.raises(PromptError, match=r"text of message 1 of 2 \(system\) 0 times"):
        template(DROPS).render(chat("S", "Q"))
    assert template(DROPS).render(chat("S", "Q")[1:]).text
    with pytest.raises(PromptError, match=r"text of message 1 of 2 \(system\) 2 times"):
        template(REPEATS).render(chat("S", "Q"))
    with pytest.raises(PromptError, match="own because of the text of message 1 of 3"):
        template(RELATED).render(chat("Some", "Q" * 9, "A"))
    with pytest.raises(PromptError, match="writes '<|im_end|>' into the text of message 2 of 2"):
        template(ADDS).render(chat("S", "a b a"))


def test_refusals_of_a_template_are_reported(template: Any) -> None:
    with pytest.raises(PromptError, match=r"system, user: System role not supported .*first user"):
        template(GEMMA).render(chat("S", "Q"))
    with pytest.raises(PromptError, match="user, user: roles must alternate"):
        template(MISTRAL).render([ChatMessage.of("user", "a"), ChatMessage.of("user", "b")])
    with pytest.raises(PromptError, match="and 4 more: Conversation roles must alternate"):
        template(LLAMA2).render([ChatMessage.of("user", "a")] * 9)
    with pytest.raises(PromptError, match=r"cannot render these 2 messages \(TypeError"):
        template("{{ messages + 1 }}").render(chat("S", "Q"))
    with pytest.raises(PromptError, match="there are no messages"):
        template(CHATML).render([])


def test_unknown_roles_are_refused(template: Any) -> None:
    for role in ("critic", "user|><|im_end", "<|im_end|>", ""):
        with pytest.raises(
            PromptError, match="message 1 of 1 has the role .* does not know: use sy"
        ):
            template(CHATML).render([ChatMessage.of(role, "a")])
    assert template("{{ 'critic' }}" + CHATML).render([ChatMessage.of("critic", "a")]).text


def test_the_assistants_last_message_is_continued(template: Any) -> None:
    for source in (CHATML, LLAMA2, None, THINKS):
        made = template(source)
        for answer in ("It is blue, ", "Blue"):
            messages = chat("S", "Q", answer)
            rendered = made.render(messages)
            assert rendered.text == of_transformers(made, messages)
            assert rendered.segments[-1].kind == "text"
            assert answer.rstrip().endswith(rendered.segments[-1].text.strip())
    assert template(CHATML).render(chat("S", "Q", "")).text.endswith("<|im_start|>assistant\n")
    with pytest.raises(
        PromptError, match="cannot continue the assistant's message, message 3 of 3"
    ):
        template(LOWERS).render(chat("S", "Q", "Well"))


def test_names_of_control_tokens_stay_text(template: Any) -> None:
    made = template(TOOLS)
    messages = [
        ChatMessage.of("user", "end<|im_end|>"),
        ChatMessage.of(
            "assistant",
            "",
            tool_calls=[{"function": {"name": "f", "arguments": {"x": ["<|im_end|> <bos>"]}}}],
        ),
        ChatMessage("tool", (Segment('say "'), Segment('<tool_call>"\n\n', "chunk", "t"))),
    ]
    tools = [{"name": "f", "description": "ends with <|im_end|>"}]
    rendered = made.render(messages, tools=tools)
    assert rendered.text == of_transformers(made, messages, tools=tools)
    own = "".join(segment.text for segment in rendered.segments if segment.kind == "template")
    assert (own.count("<|im_end|>"), own.count("<bos>"), own.count("<tool_call>")) == (4, 0, 1)
    assert rendered.text.count("<|im_end|>") == 7
    assert chunks(rendered) == [Segment('<tool_call>\\"\\n\\n', "chunk", "t")]
    with pytest.raises(PromptError, match="the key '<eos>x' of a tool or message contains a contr"):
        made.render(messages, tools=[{"parameters": {"<eos>x": 1}}])


def test_ten_thousand_messages(template: Any) -> None:
    messages = chat("S", *(f"text number {n}" for n in range(9_999)), "last")[:10_000]
    messages.append(ChatMessage.of("user", "q"))
    rendered = template(CHATML).render(messages)
    assert rendered.message_of[-1] == len(messages) - 1 == 10_000
    assert len(rendered.segments) == 2 * len(messages) + 1


def test_a_model_without_a_template_gets_a_plain_layout(template: Any) -> None:
    made = template(None)
    question = [ChatMessage.of("user", "Question: q")]
    rendered = made.render(question, [ONE, TWO], instructions=SYSTEM + SEPARATOR)
    assert rendered.text == f"<bos>{SYSTEM}\n\n{ONE.text}{TWO.text}Question: q\nAnswer:"
    assert chunks(rendered) == [ONE, TWO]
    longer = made.render(chat("Be brief.", "q", "a", "r"))
    assert longer.text == "<bos>Be brief.\n\nq\nAnswer: a\n\nr\nAnswer:"
    result = [*chat("", "q", ""), ChatMessage.of("tool", "found")]
    assert made.render(result).text == "<bos>qfound\nAnswer:"


@pytest.mark.parametrize("name", ["CHATML", "LLAMA2", "GEMMA", "DATED", "THINKS", "PLAIN", "DROPS"])
def test_the_simple_prompt_is_as_before(
    name: str, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragcache.engine import template as template_module

    monkeypatch.setattr(template_module, "check_rendering", lambda *_: None)
    made = template(ALL[name], day=date(2001, 2, 3))
    parts = split_chat_template(made.tokenizer, lambda text, **_: (), date(2001, 2, 3))
    question = ChatMessage.of("user", "Question: q")
    rendered = made.render([question], [ONE], instructions=SYSTEM + SEPARATOR)
    assert rendered.text == f"{parts.before}{ONE.text}Question: q{parts.after}"
    first = made.render([question, *chat("", "A", "R")[2:]], instructions=SYSTEM)
    assert first.text.index(SYSTEM) < first.text.index("Question: q")
    if name not in ("GEMMA", "DROPS"):
        own = chat("S", "Q")
        assert made.render(own, instructions=SYSTEM) == made.render(own)


def test_the_packaged_model() -> None:
    from transformers import AutoTokenizer

    made = ChatTemplate(AutoTokenizer.from_pretrained(packaged_path(TINY)))
    messages = chat("S", "Q", "A", (ONE, Segment("R")))
    assert made.render(messages).text == of_transformers(made, messages)


def test_a_custom_template(template: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"setting template is broken in line 2 \(Expected"):
        template(CHATML, source="fine\n{% if %}")
    with pytest.raises(ModelError, match=r"the chat template is broken in line 1 \(Expected"):
        template("{% if %}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tried: list[str] = []

    def note(text: str, fix: str) -> str:
        tried.append(text)
        return fix

    monkeypatch.setattr(rendering, "_render_in_subprocess", note)
    made = template(CHATML, source=MISTRAL)
    assert [len(json.loads(text)["conversations"][0]) for text in tried] == [4, 3]
    assert made.render(chat("S", "Q")[1:]).text == "<bos>[INST] Q [/INST]"
    template(CHATML, source=MISTRAL)
    assert len(tried) == 2

    def refuse(*_: Any, fix: str, **__: Any) -> None:
        raise ModelError(f"the chat template does not end. {fix}")

    monkeypatch.setattr(chat_module, "check_rendering", refuse)
    with pytest.raises(ConfigError, match="does not end. Correct the setting template"):
        template(CHATML, source=GEMMA)


WORDS = st.sampled_from(
    ["", " ", "\n", "\n\n", "a", "Word", "two words", "<|im_end|>", "<think>", "</think>", "9"]
    + [
        "<|im_start|>user\n",
        "\u00e9\U0001f600",
        '"\\',
        "90000000000000000000000",
        "\u2028",
        "{{ x }}",
    ]
)
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=5).map("".join)
CONTENTS = st.lists(st.builds(Segment, TEXTS, st.sampled_from(["text", "chunk"])), max_size=4).map(
    tuple
)
FREE = ["CHATML", "DOCUMENTS", "DOCUMENTS_IN_JSON", "DATED", "THINKS", "TOOLS", "REORDERS", "PLAIN"]


@pytest.mark.parametrize("name", list(ALL))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chat_is_rendered_exactly_or_refused(name: str, data: st.DataObject) -> None:
    tokenizer = copy.copy(models.tokenizer())
    tokenizer.chat_template = ALL[name]
    made = ChatTemplate(tokenizer, day=date.today())
    roles = st.sampled_from(["user", "assistant", "system", "tool"])
    messages = data.draw(
        st.lists(CONTENTS, min_size=1, max_size=5).map(lambda all: chat(*all))
        | st.lists(CONTENTS, min_size=1, max_size=5).map(lambda all: chat((), *all)[1:])
        | st.lists(st.builds(ChatMessage, roles, CONTENTS), min_size=1, max_size=5)
    )
    assume(any(message.text.strip() for message in messages))
    try:
        rendered = made.render(messages)
    except PromptError as error:
        assert "cannot be cut" not in str(error) or name == "RELATED"
        if name in FREE and messages[-1].role != "assistant":
            assert name == "THINKS"
        return
    assert rendered.text == of_transformers(made, messages)
    given = "".join(message.text for message in messages)
    for segment in rendered.segments:
        assert segment.text
        if segment.kind == "template" and name in ("CHATML", "THINKS", "TOOLS"):
            assert "Word" not in segment.text and "{{ x }}" not in segment.text
        if segment.kind == "chunk" and name not in ("TOOLS",):
            assert segment.text in given
