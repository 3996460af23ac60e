"""How many tokens a text has, and a prompt, without answering it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragcache.engine.base import ChunkEngine
from ragcache.engine.template import PromptTemplate
from ragcache.errors import ContextError

_CHARACTERS = 16  # of a text, for every token of the context: a longer text cannot fit


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a prompt, by its parts."""

    prefix_tokens: int
    chunk_tokens: int
    question_tokens: int

    @property
    def count(self) -> int:
        return self.prefix_tokens + self.chunk_tokens + self.question_tokens


def prompt_counts(template: PromptTemplate, question: str, chunks: Sequence[str]) -> Counts:
    """Of the prompt that ``template`` makes. A blank question has no tokens: a list of
    messages may be counted before it is complete. PromptError for a blank chunk."""
    return Counts(
        len(template.prefix),
        sum(len(template.chunk(text)) for text in chunks),
        len(template.question(question)) if question.strip() else 0,
    )


def check_countable(engine: ChunkEngine, texts: Sequence[str]) -> None:
    """Raise ContextError, before anything is tokenised, for so much text that it cannot fit the
    context: tokenising takes a turn of the engine's thread."""
    given, most = sum(map(len, texts)), _CHARACTERS * engine.context_tokens
    if given > most:
        raise ContextError(
            f"{given} characters are more than the {most} that are counted at a time, "
            f"{_CHARACTERS} for each of the {engine.context_tokens} tokens that {engine.name} "
            "reads: they cannot fit. Count less text at a time."
        )
