"""Chats as the model's own chat template renders them, in segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from ragcache.engine.chat_cut import Slot, cut_rendering
from ragcache.engine.chat_documents import (
    DocumentsIn,
    as_variable,
    with_documents,
    without_separator,
)
from ragcache.engine.chat_message import ChatMessage, check_messages, with_strings
from ragcache.engine.jinja_source import PLAIN_LAYOUT, parse_source
from ragcache.engine.prompt_date import uses_date, with_fixed_date
from ragcache.engine.rendering import check_rendering
from ragcache.errors import ConfigError, ModelError, PromptError
from ragcache.types import Segment

__all__ = ["RenderedChat"]

_DOCUMENT_KEYS = ("text", "content", "contents")  # names of a document's text in templates
_PROBE = "4170923856"  # a text that templates do not change


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat's text in segments, none of them empty.

    ``message_of`` has for each segment the index of its message. The template's own text, and
    documents that it places, belong to the message before them; text before the first message
    belongs to the first. A system message that was added counts as a message.
    """

    segments: tuple[Segment, ...]
    message_of: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template of a ``tokenizer`` of transformers.

    ``source``, the setting ``template``, is Jinja and replaces the model's own template. If the
    template contains the date, it is that of ``day``; None: of today. A tokenizer without a
    template gets a plain layout.

    Raises ConfigError if ``source`` is broken or does not end, ModelError if the model's own
    template is broken.
    """

    tokenizer: Any
    source: str | None = None
    day: date | None = None

    def __post_init__(self) -> None:
        from jinja2.exceptions import TemplateSyntaxError

        try:
            parse_source(self._source())
        except TemplateSyntaxError as error:
            reason = f"is broken in line {error.lineno} ({error.message})"
            if self.source is None:
                raise ModelError(
                    f"the chat template {reason}. Change chat_template.jinja in the model's "
                    "folder, or use another model."
                ) from error
            raise ConfigError(
                f"the setting template {reason}. Correct that line, or leave the setting out to "
                "use the model's own chat template."
            ) from error
        if self.source is not None:
            self._check(self.source)

    def render(
        self,
        messages: Sequence[ChatMessage],
        documents: Sequence[Segment] = (),
        *,
        documents_in: DocumentsIn = "user",
        instructions: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedChat:
        """The chat as the template renders it, cut into segments. Their joined text is equal to
        that of ``apply_chat_template``.

        Each of ``documents`` ends with the separator of chunks. A template that reads ``documents``
        gets them without it, and places them; otherwise they are placed as ``documents_in`` says.
        ``instructions`` are a system message if ``messages`` have none, or, if the template has no
        system role, the beginning of the first user message.
        If the last message is the assistant's, the text ends with it; otherwise, with the beginning
        of the assistant's turn.

        Raises PromptError if the template refuses the messages, or drops, repeats or changes a part
        of them so that its text cannot be cut.
        """
        if not messages:
            raise PromptError("there are no messages: send at least one, whose role is user")
        source = self._source(tools, documents)
        parsed = parse_source(source)
        check_messages(messages, tools or (), parsed.words, self._control)
        places = bool(documents) and parsed.documents  # the template does

        def place(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
            if not documents or places:
                return list(messages)
            return with_documents(messages, documents, documents_in)

        given = self._with_instructions(messages, instructions, place)
        slots = [
            Slot(message.content, f"message {index + 1} of {len(given)} ({message.role})", index)
            for index, message in enumerate(given)
        ]
        key = ""
        if places:
            key = self._document_key(source)
            slots += [
                Slot((without_separator(one),), f"document {index + 1} of {len(documents)}")
                for index, one in enumerate(documents)
            ]

        def rendered(texts: Sequence[str], changed: Callable[[str], str]) -> str:
            contents = zip(given, texts, strict=False)
            chat = [
                {**with_strings(message.fields, changed), "role": message.role, "content": text}
                for message, text in contents
            ]
            numbered = enumerate(texts[len(given) :], start=1)
            placed = [as_variable(key, text, number, source) for number, text in numbered]
            return self._apply(source, chat, placed, with_strings(tools, changed))

        parts = cut_rendering(slots, rendered, self._control)
        return RenderedChat(tuple(part for part, _ in parts), tuple(index for _, index in parts))

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the template takes a system message before a user's."""
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
        try:
            return self._apply(self._source(), probe).count(_PROBE) == 1
        except PromptError:
            return False

    # private

    def _with_instructions(
        self,
        messages: Sequence[ChatMessage],
        instructions: str,
        place: Callable[[Sequence[ChatMessage]], list[ChatMessage]],
    ) -> list[ChatMessage]:
        """The messages after ``place`` has placed the documents, with ragcache's own instructions
        before all of them, unless there is a system message."""
        if not instructions or any(one.role in ("system", "developer") for one in messages):
            return place(messages)
        if self._has_system_role:
            return place([ChatMessage.of("system", instructions), *messages])
        given = place(messages)
        for index, message in enumerate(given):
            if message.role == "user":
                content = (Segment(instructions), *message.content)
                given[index] = replace(message, content=content)
                break
        return given

    def _source(self, tools: object = None, documents: object = None) -> str:
        if self.source is not None:
            return self.source
        own = getattr(self.tokenizer, "chat_template", None)
        if not own:
            return PLAIN_LAYOUT
        if documents and isinstance(own, dict) and "rag" in own:
            return str(own["rag"])
        return str(self.tokenizer.get_chat_template(None, tools))

    @cached_property
    def _control(self) -> frozenset[str]:
        """The names of control tokens."""
        return frozenset(name for name in self.tokenizer.get_added_vocab() if name.strip())

    def _check(self, source: str) -> None:
        """Render small chats within limits. Raises ConfigError."""
        turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
        document = as_variable("text", "d", 1, "")
        for roles in ([("system", "s"), *turns], turns):
            chat = [{"role": role, "content": text} for role, text in roles]
            fix = "Correct the setting template, or leave it out to use the model's own."
            try:
                check_rendering(self.tokenizer, source, chat, documents=[document], fix=fix)
            except ModelError as error:
                raise ConfigError(str(error)) from error

    def _document_key(self, source: str) -> str:
        """The key of a document's text that the template reads. Raises PromptError if none is."""
        chat = [{"role": "user", "content": "a"}]
        for key in _DOCUMENT_KEYS:
            try:
                if _PROBE in self._apply(source, chat, [as_variable(key, _PROBE, 1, source)]):
                    return key
            except PromptError:
                continue
        raise PromptError(
            "the chat template has the variable documents, but writes none of their texts, in "
            f"{', '.join(_DOCUMENT_KEYS)}. Set another template that writes them."
        )

    def _apply(
        self,
        source: str,
        chat: list[dict[str, Any]],
        documents: list[dict[str, Any]] | None = None,
        tools: Any = None,
    ) -> str:
        """The rendered text. Raises PromptError if the template refuses the messages."""
        from jinja2.exceptions import TemplateError

        continued = chat[-1]["role"] == "assistant"
        dated = with_fixed_date(source, self.day or date.today()) if uses_date(source) else source
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat,
                    chat_template=dated,
                    tokenize=False,
                    documents=documents or None,
                    tools=tools or None,
                    continue_final_message=continued,
                    add_generation_prompt=not continued,
                )
            )
        except TemplateError as error:
            roles = [message["role"] for message in chat]
            raise PromptError(
                f"the chat template refuses the messages, whose roles are {_shown(roles)}: "
                f"{str(error)[:300]} {_REFUSED}"
            ) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if continued and isinstance(error, ValueError):  # it quotes the whole chat
                raise PromptError(
                    f"the chat template cannot continue the assistant's message, message "
                    f"{len(chat)} of {len(chat)}: it drops or changes its end. Let a user message "
                    "be the last, or set another template."
                ) from error
            raise PromptError(
                f"the chat template cannot render these {len(chat)} messages "
                f"({type(error).__name__}: {str(error)[:300]}). {_REFUSED}"
            ) from error


_REFUSED = (
    "Change the messages (a system message's text may have to stand in the first user message, and "
    "roles may have to alternate), or set another template."
)


def _shown(roles: Sequence[str]) -> str:
    more = f" and {len(roles) - 5} more" if len(roles) > 5 else ""
    return ", ".join(roles[:5]) + more
