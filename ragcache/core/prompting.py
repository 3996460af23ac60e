"""Make the prompt of a request: its messages and chunks, rendered and tokenised part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ragcache.core.request import Request
from ragcache.engine.base import ChunkEngine
from ragcache.engine.chat import RenderedChat
from ragcache.engine.chat_documents import DocumentsIn
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.template import (
    SEPARATOR,
    SYSTEM,
    PromptTemplate,
    chunk_text,
    text_tokens,
)
from ragcache.errors import ConfigError, PromptError
from ragcache.retriever.known_texts import KnownTexts
from ragcache.retriever.parts import find_parts
from ragcache.types import Chunk, Part, Passage, Prompt, Segment

__all__ = ["PromptBuilder", "question_of", "read_template"]

MIN_FOUND_TOKENS = 64  # a part of a searched message that has fewer is no chunk

#: Messages before the first chunk that have fewer characters are one part with the next one: each
#: part is looked up by all that precedes it.
_LEAST_CHARS = 256

_UNNAMED = "unnamed"  # id of a chunk that was given without one

#: Roles whose texts are only searched for known chunks: such a message is usually the same in every
#: prompt, and exact where it stands before the first chunk.
_FIXED_ROLES = ("system", "developer")


class BuiltPrompt(NamedTuple):
    """A prompt and the passages of its chunks, in order."""

    prompt: Prompt
    passages: tuple[Passage, ...]


class _Piece(NamedTuple):
    """A segment of a rendered chat."""

    segment: Segment
    message: int  # its number
    chunk: Part | None  # None: text


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Makes the prompts of a store.

    A question without instructions of its own is placed in ``template``. Messages are rendered by
    the model's chat template as they are, see :class:`ragcache.engine.chat.ChatTemplate`.
    """

    engine: ChunkEngine
    template: PromptTemplate  # of questions
    instructions: str | None = None  # of questions; None: ragcache's own
    source: str | None = None  # Jinja source of the chat template; None: the model's own
    documents_in: DocumentsIn = "user"
    find_chars: int = 0  # length from which texts of messages are searched for chunks; 0: never
    #: The texts of the stored chunks.
    known: Callable[[], KnownTexts] = KnownTexts

    def build(
        self, request: Request, passages: Sequence[Passage], messages: Sequence[ChatMessage]
    ) -> BuiltPrompt:
        """The prompt of ``request`` with these ``passages`` as documents. ``messages``: those of
        the request, as :meth:`read` returns them.

        Raises PromptError for a blank question or chunk, and for messages that the template
        refuses or changes.
        """
        if self.is_plain(request):
            texts = [passage.chunk.text for passage in passages]
            return BuiltPrompt(self.template.prompt(texts, request.question), tuple(passages))
        instructions, source = self._instructions(request), self._source(request)
        template = self.engine.chat_template(source, self.template.day)
        if not messages:
            instructions = (SYSTEM if instructions is None else instructions) + SEPARATOR
            messages = [ChatMessage.of("user", f"Question: {request.question.strip()}")]
        rendered = template.render(
            messages,
            [_document(passage) for passage in passages],
            documents_in=request.documents_in or self.documents_in,
            instructions=instructions or "",
            tools=request.tools,
        )
        return self._tokenised(rendered, passages, self._searches(request.find_chunks))

    def is_plain(self, request: Request) -> bool:
        """Whether the prompt is a question in :attr:`template`: no chat, and without instructions
        or a chat template of its own."""
        own = self._instructions(request), self._source(request)
        return request.messages is None and own == (None, None)

    def _instructions(self, request: Request) -> str | None:
        return self.instructions if request.instructions is None else request.instructions

    def _source(self, request: Request) -> str | None:
        return self.source if request.template is None else request.template

    def read(self, messages: Sequence[Mapping[str, Any]], find: bool | None) -> list[ChatMessage]:
        """The messages of a request, as in OpenAI's API: a role, and a content that is a text or a
        list of parts. A part is a text, ``{"type": "text", "text"}``, or a chunk, ``{"type":
        "chunk", "text", "id"}``, whose id is for the report. Without chunks, of several texts of a
        user's message all but the last are chunks. A text ends with a line break before another
        part, and a chunk with a blank line. Arguments of tool calls that are JSON are given to the
        template as objects.

        ``find``: whether to search long texts for chunks; None: as in the settings. Raises
        PromptError for messages of another form.
        """
        if not messages:
            raise PromptError("there are no messages: give at least one")
        searched = self._searches(find)
        return [self._message(number, each, searched) for number, each in enumerate(messages)]

    def _searches(self, find: bool | None) -> bool:
        return self.find_chars > 0 if find is None else find

    def _message(self, number: int, given: Mapping[str, Any], find: bool) -> ChatMessage:
        if not isinstance(given, Mapping):
            raise PromptError(
                f"message {number} is a {type(given).__name__}: give a dictionary with role and "
                "content"
            )
        fields = dict(given)
        role, content = fields.pop("role", None), fields.pop("content", None)
        if not isinstance(role, str) or not role:
            raise PromptError(f"message {number} has no role: give system, user, assistant or tool")
        parts = _content(number, content)
        if role == "user" and not any(segment.kind == "chunk" for segment in parts):
            parts = [*(_given_chunk(each.text) for each in parts[:-1]), *parts[-1:]]
        segments: list[Segment] = []
        for kind, run in groupby(parts, key=lambda segment: segment.kind):
            if kind == "chunk":
                segments += run
                continue
            texts = list(run)
            text = "\n".join(segment.text for segment in texts)
            if texts[-1] is not parts[-1]:
                text += "\n"  # a chunk follows
            if find and len(text) >= max(1, self.find_chars):
                least = {"min_chars": len(text) + 1} if role in _FIXED_ROLES else {}
                segments += find_parts(text, self.known(), **least)
            elif text:
                segments.append(Segment(text))
        return ChatMessage(role, tuple(segments), _with_parsed_arguments(fields))

    def _tokenised(
        self, rendered: RenderedChat, passages: Sequence[Passage], searched: bool
    ) -> BuiltPrompt:
        """Tokenise each part alone. ``searched``: whether the messages were searched for chunks."""
        by_id = {passage.chunk.id: passage for passage in passages}
        pieces = [
            _Piece(segment, number, self._chunk(segment))
            for segment, number in zip(rendered.segments, rendered.message_of, strict=True)
        ]
        parts: list[Part] = []
        placed: list[Passage] = []
        run: list[Segment] = []

        def close() -> None:
            if run:
                parts.append(Part(text_tokens(self.engine.tokenize, run)))
                run.clear()

        message = 0
        for segment, number, part in self._with_texts_as_chunks(pieces) if searched else pieces:
            if number != message and not placed and sum(len(s.text) for s in run) >= _LEAST_CHARS:
                close()
            message = number
            if part is None:
                run.append(segment)
                continue
            close()
            parts.append(part)
            found = Passage(_named(segment, f"message {number}#{len(placed)}"), 0.0)
            placed.append(by_id.get(segment.id, found))
        close()
        prompt = Prompt(_ending_in_text(parts))
        return BuiltPrompt(prompt, tuple(placed[: len(prompt.chunks)]))

    def _with_texts_as_chunks(self, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
        """The pieces, with texts of messages between chunks as chunks too, so that they are not
        computed again wherever something before them changes. Texts before the first chunk are
        not: they are exact. Nor is the text after the chunks of the last message: the question."""
        first = next((at for at, piece in enumerate(pieces) if piece.chunk), len(pieces))
        of_question = takewhile(
            lambda piece: piece.chunk is None and piece.message == pieces[-1].message,
            reversed(pieces[first:]),
        )
        asking = len(pieces) - sum(1 for _ in of_question)
        yield from pieces[:first]
        for (is_text, _), run in groupby(pieces[first:asking], key=_run_of_text):
            texts = list(run)
            whole = Segment("".join(piece.segment.text for piece in texts), "chunk")
            part = self._chunk(whole) if is_text and not whole.text.isspace() else None
            yield from texts if part is None else [_Piece(whole, texts[0].message, part)]
        yield from pieces[asking:]

    def _chunk(self, segment: Segment) -> Part | None:
        """The part of a chunk; None for text, and for a found part that is too short."""
        if segment.kind != "chunk":
            return None
        tokens = self.engine.tokenize(segment.text)
        if not segment.id and len(tokens) < MIN_FOUND_TOKENS:
            return None
        stored = None if segment.stored is None else self.engine.tokenize(segment.stored)
        if stored is not None and stored[: len(tokens)] != tokens:
            stored = None
        return Part(tokens, True, stored)


def _run_of_text(piece: _Piece) -> tuple[bool, int]:
    """Equal for adjacent texts of one message. The template's own text is none."""
    return piece.chunk is None and piece.segment.kind != "template", piece.message


def question_of(messages: Sequence[ChatMessage]) -> str:
    """The text to retrieve chunks for: what the last user's message has besides chunks."""
    last = next((message for message in reversed(messages) if message.role == "user"), None)
    texts = () if last is None else last.content
    return "".join(segment.text for segment in texts if segment.kind == "text").strip()


def read_template(path: Path) -> str:
    """The source of a chat template in a file. Raises ConfigError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the template {path} cannot be read: {error}. Name a file with a chat template in "
            "Jinja."
        ) from error


def _content(number: int, content: Any) -> list[Segment]:
    """The texts and chunks of a content, without empty texts."""
    if content is None:
        return []
    if isinstance(content, str):
        return [Segment(content)]
    if isinstance(content, Sequence):
        segments = [_segment(number, part) for part in content]
        return [segment for segment in segments if segment.text]
    raise PromptError(
        f"the content of message {number} is a {type(content).__name__}: give a text, or a list of "
        "texts"
    )


def _segment(number: int, part: Any) -> Segment:
    if isinstance(part, str):
        return Segment(part)
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
        if kind == "text":
            return Segment(text)
        if kind == "chunk":
            return _given_chunk(text, part.get("id"))
    raise PromptError(f"message {number} has a part of type {kind!r}: only text is supported")


def _given_chunk(text: str, id: Any = None) -> Segment:
    return Segment(chunk_text(text), "chunk", _UNNAMED if id is None else str(id))


def _named(segment: Segment, other: str) -> Chunk:
    """The chunk of a segment, for the report: with its id, or else the id ``other``."""
    id = other if segment.id in ("", _UNNAMED) else segment.id
    document, mark, ordinal = id.rpartition("#")
    if mark and document and ordinal.isdecimal():
        return Chunk(document, int(ordinal), segment.text)
    return Chunk(id, 0, segment.text)


def _with_parsed_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a message, with the arguments of tool calls as objects: OpenAI's API has them as
    JSON, which templates would quote as a string."""
    calls = fields.get("tool_calls")
    if not isinstance(calls, Sequence):
        return dict(fields)
    return {**fields, "tool_calls": [_with_parsed(call) for call in calls]}


def _with_parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # as the model wrote them
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _document(passage: Passage) -> Segment:
    return Segment(chunk_text(passage.chunk.text), "chunk", passage.chunk.id)


def _ending_in_text(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, with the last token of a chunk at the end as a text: it is always computed."""
    *before, last = parts
    if not last.is_chunk:
        return tuple(parts)
    first = replace(last, tokens=last.tokens[:-1], stored=last.stored or last.tokens)
    return (*before, first, Part(last.tokens[-1:]))
