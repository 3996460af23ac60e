"""Token counts of texts and prompts, without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragcache.engine.base import ChunkEngine
from ragcache.engine.template import PromptTemplate
from ragcache.errors import ContextError

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


def count_prompt(template: PromptTemplate, question: str, chunks: Sequence[str]) -> PromptCounts:
    """Count the tokens of the prompt that ``template`` makes. A blank question has no tokens, since
    a list of messages may be counted before it is complete. Raises PromptError for a blank
    chunk."""
    return PromptCounts(
        len(template.prefix),
        sum(len(template.chunk(text)) for text in chunks),
        len(template.question(question)) if question.strip() else 0,
    )


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
