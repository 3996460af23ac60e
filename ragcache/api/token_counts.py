"""Token counts of texts and prompts, without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragcache.core.request import Request, message_text
from ragcache.engine.base import ChunkEngine
from ragcache.engine.template import PromptTemplate
from ragcache.errors import ContextError
from ragcache.rag import RagCache
from ragcache.types import Chunk, Passage

__all__ = ["PromptCounts", "check_text_length", "count_chat", "count_prompt"]

_CHARACTERS = 16  # per token of the context: a longer text cannot fit


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Token counts of a prompt's parts."""

    prefix_tokens: int
    chunk_tokens: int
    question_tokens: int

    @property
    def count(self) -> int:
        return self.prefix_tokens + self.chunk_tokens + self.question_tokens


def count_prompt(template: PromptTemplate, question: str, chunks: Sequence[str]) -> PromptCounts:
    """Count the tokens of the prompt that ``template`` makes. A blank question has no tokens, since
    a list of messages may be counted before it is complete. Raises PromptError for a blank
    chunk."""
    return PromptCounts(
        len(template.prefix),
        sum(len(template.chunk(text)) for text in chunks),
        len(template.question(question)) if question.strip() else 0,
    )


def count_chat(cache: RagCache, request: Request) -> PromptCounts:
    """Count the tokens of the prompt of a request's messages and chunks. Nothing is retrieved.

    Raises ContextError for texts that cannot fit, and PromptError as
    :meth:`ragcache.core.prompting.PromptBuilder.build`.
    """
    given = [chunk for chunk in request.chunks or () if isinstance(chunk, Chunk)]
    messages = request.messages or ()
    texts = [chunk.text for chunk in given]
    check_text_length(cache.engine, [*texts, *map(message_text, messages)])
    read = cache.prompts.read(messages, request.find_chunks)
    prompt, _ = cache.prompts.build(request, [Passage(chunk, 0.0) for chunk in given], read)
    chunk_tokens = sum(map(len, prompt.chunks))
    prefix_tokens = len(prompt.prefix)
    return PromptCounts(prefix_tokens, chunk_tokens, len(prompt) - prefix_tokens - chunk_tokens)


def check_text_length(engine: ChunkEngine, texts: Sequence[str]) -> None:
    """Raise ContextError if the texts together are too long to fit the context. Checked before
    tokenizing, which would occupy the engine's thread."""
    length, limit = sum(map(len, texts)), _CHARACTERS * engine.context_tokens
    if length > limit:
        raise ContextError(
            f"{length} characters are more than the limit of {limit}, {_CHARACTERS} for each of "
            f"the {engine.context_tokens} tokens in the context of {engine.name}: they cannot fit. "
            "Count less text at a time."
        )
