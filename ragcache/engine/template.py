"""From texts to a Prompt: the chat template split once, every part tokenised alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Protocol

from ragcache.engine.prompt_date import asks, on
from ragcache.engine.rendering import check_rendering
from ragcache.errors import ModelError, PromptError
from ragcache.types import Prompt, Tokens

SYSTEM = "Use the notes to answer the question."
SEPARATOR = "\n\n"  # ends the instructions and every chunk
_MARK = "<<ragcache-context>>"


class Tokenize(Protocol):
    """See :meth:`ragcache.engine.base.Engine.tokenize`."""

    def __call__(self, text: str, *, control: bool = False) -> Tokens: ...


@dataclass(frozen=True)
class PromptTemplate:
    """What stands before the chunks and behind the question.

    A prompt reads ``before | chunk SEPARATOR | ... | lead Question: question after``. The parts are
    tokenised one by one and their ids concatenated, so a chunk has the same ids in every prompt.
    Only the template's own text can make control tokens. ``lead``, what is said before the
    question, is computed with it for every prompt: the prefix is the same for all. ``day`` is the
    date that the chat template has put into it; None where it puts none.
    """

    before: str
    after: str
    tokenize: Tokenize
    day: date | None = None

    @cached_property
    def prefix(self) -> Tokens:
        return self.tokenize(self.before, control=True)

    def chunk(self, text: str) -> Tokens:
        """Ids of one chunk, its separator included. PromptError if the text is blank."""
        if not text.strip():
            raise PromptError("a chunk is empty: leave it out, or give it text")
        return self.tokenize(text.strip() + SEPARATOR)

    def question(self, text: str, lead: str = "") -> Tokens:
        """Ids of ``lead``, the question and what the template puts behind it."""
        if not text.strip():
            raise PromptError("the question is empty: ask something")
        asked = f"Question: {text.strip()}"
        if lead.strip():
            asked = f"{lead.strip()}{SEPARATOR}{asked}"
        whole = self.tokenize(asked + self.after, control=True)
        if self.tokenize(asked, control=True) == (plain := self.tokenize(asked)):
            return whole
        return plain + self.tokenize(self.after, control=True)

    def prompt(self, chunks: Sequence[str], question: str, lead: str = "") -> Prompt:
        return Prompt(self.prefix, tuple(map(self.chunk, chunks)), self.question(question, lead))


def split_chat_template(
    tokenizer: Any, tokenize: Tokenize, day: date | None = None
) -> PromptTemplate:
    """Render the tokenizer's chat template around a mark and cut it there.

    A template that asks for the date is told that of ``day``; None: of today. Templates without a
    system role get the instructions at the head of the user's turn; a tokenizer without a template
    gets a plain layout. Raises ModelError if a template drops, repeats or changes the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        bos = tokenizer.bos_token or ""
        return PromptTemplate(f"{bos}{SYSTEM}{SEPARATOR}", "\nAnswer:", tokenize)
    source, today = tokenizer.get_chat_template(), day or date.today()
    if not asks(source):
        return PromptTemplate(*_cut(tokenizer, source), tokenize)
    parts = _cut(tokenizer, source, today)
    dated = any(parts != _cut(tokenizer, source, other) for other in _OTHERS)
    return PromptTemplate(*parts, tokenize, today if dated else None)


#: Days that are written in no way alike, so that no day is written like both.
_OTHERS = date(1987, 3, 7), date(1999, 10, 25)


def _cut(tokenizer: Any, source: str, day: date | None = None) -> tuple[str, str]:
    """What a chat template says before the chunks, and behind the question, on a day."""
    system = SYSTEM + SEPARATOR
    rendered = _render(
        tokenizer,
        source,
        day,
        [{"role": "system", "content": system}, {"role": "user", "content": _MARK}],
    )
    if rendered is None or SYSTEM not in rendered:
        rendered = _render(tokenizer, source, day, [{"role": "user", "content": system + _MARK}])
    if rendered is None or rendered.count(_MARK) != 1 or SYSTEM not in rendered:
        raise ModelError(
            "the chat template does not carry the user's text unchanged, so chunks cannot be "
            "placed in it. Give the tokenizer a template that does (tokenizer.chat_template)."
        )
    before, after = rendered.split(_MARK)
    return before, after


def _render(
    tokenizer: Any, source: str, day: date | None, messages: list[dict[str, str]]
) -> str | None:
    """The rendered text, or None where the template refuses these roles. ModelError where it is
    broken or does not end."""
    from jinja2.exceptions import TemplateError

    check_rendering(tokenizer, source, messages)  # which ends or not, whatever day it is
    source = source if day is None else on(source, day)
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        )
    except TemplateError:
        return None
