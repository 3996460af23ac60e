"""Token counts of texts and prompts, without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ragcache.core.request import Request
from ragcache.engine.base import ChunkEngine
from ragcache.errors import ContextError
from ragcache.rag import RagCache
from ragcache.types import Chunk, Passage

__all__ = ["count_prompt"]

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


def count_prompt(cache: RagCache, request: Request) -> PromptCounts:
    """Count the tokens of a request's prompt, with the chunks that it has. A blank question has no
    tokens, since a list of messages may be counted before it is complete. Raises PromptError for a
    blank chunk, and for messages that the chat template refuses."""
    blank = request.messages is None and not request.question.strip()
    if blank:
        request = replace(request, question="?")
    chunks = [chunk for chunk in request.chunks or () if isinstance(chunk, Chunk)]
    messages = request.messages
    read = [] if messages is None else cache.prompts.read(messages, request.find_chunks)
    prompt, _ = cache.prompts.build(request, [Passage(chunk, 0.0) for chunk in chunks], read)
    prefix, chunk_tokens = len(prompt.prefix), sum(map(len, prompt.chunks))
    rest = 0 if blank else len(prompt) - prefix - chunk_tokens
    return PromptCounts(prefix, chunk_tokens, rest)


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
