"""Render a model's chat template as it is, and cut the text into the messages' contents and the
template's own text.

The template is rendered with a mark in place of every content, and cut at the marks. It is rendered
with the contents too: the pieces, joined, are that text to the character, or the messages are
refused.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, Literal

from ragcache.engine.prompt_date import uses_date, with_fixed_date
from ragcache.engine.rendering import check_rendering
from ragcache.errors import ConfigError, ModelError, PromptError
from ragcache.types import Segment

__all__ = ["ChatMessage", "ChatTemplate", "DocumentsIn"]

#: The message that documents are placed in, where the template has no place for them: the last
#: user's, before its text; or the system message, after its text.
DocumentsIn = Literal["user", "system"]

_MOST_CHANGED = 32  # contents that a template may change: each takes one more rendering
_DOCUMENT_FIELDS = "text", "content", "contents"  # names that templates use for a document's text
#: The layout of prompts for models without a chat template.
_PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'].rstrip() + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '\nAnswer: ' + message['content'] }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% else %}{{ message['content'] }}{% if not loop.last and "
    "loop.nextitem['role'] != 'assistant' %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
)
_SAMPLE = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "Why?"},
)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a chat. ``fields``: what else a template may read, such as ``tool_calls``."""

    role: str
    content: tuple[Segment, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, role: str, text: str) -> ChatMessage:
        """A message of one text."""
        return cls(role, (Segment(text),))

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.content)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, with which messages are rendered.

    ``source``: in Jinja. ``day``: the date that it sees, where it uses one; None: today.
    """

    tokenizer: Any
    source: str
    day: date | None = None

    @classmethod
    def of(cls, tokenizer: Any, source: str | None = None, day: date | None = None) -> ChatTemplate:
        """The template of ``tokenizer``, or ``source`` in its place. A model without a template
        gets a plain layout.

        Raises ConfigError if ``source`` is no valid template, or does not end.
        """
        if source is None:
            own = getattr(tokenizer, "chat_template", None)
            return cls(tokenizer, tokenizer.get_chat_template() if own else _PLAIN, day)
        try:
            check_rendering(tokenizer, source, list(map(dict, _SAMPLE)))
        except ModelError as error:
            raise ConfigError(f"the setting template cannot be used: {error}") from error
        return cls(tokenizer, source, day)

    def render(
        self,
        messages: Sequence[ChatMessage],
        documents: Sequence[Segment] = (),
        *,
        documents_in: DocumentsIn = "user",
        tools: Sequence[Mapping[str, Any]] | None = None,
        fold_system: bool = False,
    ) -> tuple[tuple[Segment, ...], ...]:
        """The segments of the rendered messages, by message.

        The template's text after a content belongs to that message, and its text before the first
        content to the first. ``documents`` are passed to a template that has a place for them;
        otherwise they go into the message ``documents_in``. If the last message is the assistant's,
        it is to be continued. ``fold_system``: if the template has no system role, the first
        message becomes the beginning of the second.

        Raises PromptError for messages that the template refuses, and if it drops, repeats or
        changes a chunk.
        """
        if not messages:
            raise PromptError("there are no messages: give at least one")
        if fold_system and not self._has_system_role:
            first, second, *rest = messages
            messages = [replace(second, content=first.content + second.content), *rest]
        if documents and self._document_field:
            rendering = _Rendering(self, messages, documents, tools)
        else:
            rendering = _Rendering(self, _placed(messages, documents, documents_in), (), tools)
        return rendering.segments()

    @cached_property
    def _has_system_role(self) -> bool:
        probe = _Rendering(self, [ChatMessage.of("system", "s"), ChatMessage.of("user", "u")])
        try:
            return probe.marked.count(probe.mark(0)) == 1
        except PromptError:
            return False

    @cached_property
    def _document_field(self) -> str:
        """The field of a document's text that the template reads; empty if it has no place for
        documents."""
        if "documents" not in self.source:
            return ""
        one = [ChatMessage.of("user", "u")]
        for name in _DOCUMENT_FIELDS:
            probe = _Rendering(self, one, [Segment("d", "chunk")], document_field=name)
            try:
                if probe.marked.count(probe.mark(1)) == 1:
                    return name
            except PromptError:
                continue
        return ""

    def text(
        self,
        messages: list[dict[str, Any]],
        documents: list[dict[str, str]] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The rendered text. Raises PromptError if the template refuses the messages."""
        from jinja2.exceptions import TemplateError

        source = self.source
        if uses_date(source):
            source = with_fixed_date(source, self.day or date.today())
        continued = messages[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=source,
                    documents=documents,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages[:8])
            more = ", ..." if len(messages) > 8 else ""
            raise PromptError(
                f"the chat template refuses these {len(messages)} messages ({roles}{more}): "
                f"{str(error)[:300]}. Change the messages' roles or order, or set another template."
            ) from error


class _Rendering:
    """Messages with the marks that stand for their contents."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[ChatMessage],
        documents: Sequence[Segment] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        document_field: str = "",
    ) -> None:
        self.template, self.messages, self.documents = template, messages, documents
        self.tools = None if tools is None else [dict(tool) for tool in tools]
        self._field = document_field or (template._document_field if documents else "")
        self.contents = [*(m.text for m in messages), *(d.text for d in documents)]
        while any((nonce := secrets.token_hex(6)) in text for text in self.contents):
            pass
        self._nonce = nonce

    def mark(self, number: int) -> str:
        """The mark of a message, or after the messages of a document."""
        return f"RAG{self._nonce}N{number}E"

    @cached_property
    def marked(self) -> str:
        """The text with marks for all contents that are not empty."""
        return self._render(range(len(self.contents)))

    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """See :meth:`ChatTemplate.render`."""
        real, groups = self._render(()), [list[Segment]()]
        cursor, changed, in_message = 0, 0, False
        pieces, tail = self._pieces()
        for at, (before, number) in enumerate(pieces):
            after = pieces[at + 1][0] if at + 1 < len(pieces) else tail
            if before:
                groups[-1].append(Segment(before, "template"))
            cursor += len(before)
            content = self._as_rendered(number, real, cursor, after)
            if content is None:
                changed += 1
                content = self._changed(number, before, after, changed)
            if number < len(self.messages):
                groups += [[]] if in_message else []
                in_message = True
            groups[-1] += content
            cursor += sum(len(segment.text) for segment in content)
        if tail:
            groups[-1].append(Segment(tail, "template"))
        if "".join(segment.text for group in groups for segment in group) != real:
            raise PromptError(
                f"the chat template drops or changes the texts of these {len(self.messages)} "
                "messages, so they cannot be told apart in the prompt. Set another template."
            )
        return tuple(map(tuple, groups))

    def _pieces(self) -> tuple[list[tuple[str, int]], str]:
        """The template's text before each content with the content's number, in the order of the
        text, and the template's text at the end."""
        marks = self._marks(self.marked)
        counts = Counter(number for _, _, number in marks)
        for number, content in enumerate(self.contents):
            count = counts[number]
            if count > 1 or (content and not count and self._has_chunks(number)):
                raise PromptError(
                    f"the chat template has the text of {self._name(number)} {count} times: it "
                    "must stand in the prompt once. Set another template."
                )
        ends = [0, *(end for _, end, _ in marks)]
        pieces = [
            (self.marked[at:start], number)
            for at, (start, _, number) in zip(ends, marks, strict=False)
        ]
        return pieces, self.marked[ends[-1] :]

    def _marks(self, text: str) -> list[tuple[int, int, int]]:
        """Start, end and number of every mark in ``text``, in order."""
        found = re.finditer(rf"RAG{self._nonce}N(\d+)E", text)
        return [(each.start(), each.end(), int(each[1])) for each in found]

    def _as_rendered(self, number: int, real: str, cursor: int, after: str) -> list[Segment] | None:
        """The segments of a content as it stands in ``real`` at ``cursor``, before the template's
        text ``after``; templates may strip it. None if it is another text."""
        content = self._segments(number)
        text = "".join(segment.text for segment in content)
        for left, right in ((False, False), (True, True), (False, True), (True, False)):
            start = len(text) - len(text.lstrip()) if left else 0
            stop = len(text.rstrip()) if right else len(text)
            if real.startswith(text[start:stop] + after, cursor):
                return _slice(content, start, stop)
        return None

    def _changed(self, number: int, before: str, after: str, changed: int) -> list[Segment]:
        """The text that the template makes of a content without chunks, between its own texts."""
        error = PromptError(
            f"the chat template changes the text of {self._name(number)}"
            + (f", the {changed}th of {len(self.contents)}" if changed > 1 else "")
            + ": leave out what it changes, or set another template."
        )
        if changed > _MOST_CHANGED or self._has_chunks(number):
            raise error
        alone = self._render([n for n in range(len(self.contents)) if n != number])
        around = self._marks(alone)
        order = [n for _, n in self._pieces()[0]]
        place = order.index(number)
        start = around[place - 1][1] if place else 0
        stop = around[place][0] if place < len(around) else len(alone)
        text = alone[start:stop]
        if len(around) != len(order) - 1 or len(text) < len(before + after):
            raise error
        if not text.startswith(before) or not text.endswith(after):
            raise error
        return [Segment(text[len(before) : len(text) - len(after)])]

    def _segments(self, number: int) -> Sequence[Segment]:
        count = len(self.messages)
        return self.messages[number].content if number < count else [self.documents[number - count]]

    def _has_chunks(self, number: int) -> bool:
        """Whether a content has chunks that were given as such, which must not be lost."""
        return any(s.kind == "chunk" and s.id for s in self._segments(number))

    def _name(self, number: int) -> str:
        count = len(self.messages)
        if number >= count:
            return f"document {number - count + 1} of {len(self.documents)}"
        return f"message {number + 1} of {count} ({self.messages[number].role})"

    def _render(self, marked: Collection[int]) -> str:
        shown = [
            self.mark(n) if n in marked and content else content
            for n, content in enumerate(self.contents)
        ]
        source = self.template.source
        messages = []
        for message, content in zip(self.messages, shown, strict=False):
            role = message.role
            if role == "developer" and role not in source:
                role = "system"  # its older name
            messages.append({**message.fields, "role": role, "content": content})
        documents = [{"title": "", self._field: text} for text in shown[len(messages) :]]
        return self.template.text(messages, documents or None, self.tools)


def _placed(
    messages: Sequence[ChatMessage], documents: Sequence[Segment], where: DocumentsIn
) -> Sequence[ChatMessage]:
    """The messages with the documents in one of them."""
    if not documents:
        return messages
    roles = ("user",) if where == "user" else ("system", "developer")
    number = max((n for n, each in enumerate(messages) if each.role in roles), default=None)
    if number is None:
        raise PromptError(
            f"there is no message of the role {roles[0]}, which {len(documents)} documents are to "
            f"be placed in: add one, or set documents_in"
        )
    message = messages[number]
    both = (documents, message.content) if where == "user" else (message.content, documents)
    content = (*both[0], *both[1])
    return [*messages[:number], replace(message, content=content), *messages[number + 1 :]]


def _slice(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The segments of their joined text from ``start`` to ``stop``. A chunk that loses text is
    another one."""
    kept, at = [], 0
    for segment in segments:
        first, last = max(start - at, 0), min(stop - at, len(segment.text))
        at += len(segment.text)
        if first >= last:
            continue
        text = segment.text[first:last]
        if text == segment.text:
            kept.append(segment)
        else:
            stored = segment.stored or (segment.text if first == 0 else None)
            kept.append(replace(segment, text=text, stored=stored))
    return kept
