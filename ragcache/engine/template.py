"""Make prompts from texts: split the chat template once, and tokenise each part alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

from ragcache.engine.prompt_date import uses_date, with_fixed_date
from ragcache.engine.rendering import check_rendering
from ragcache.errors import ModelError, PromptError
from ragcache.types import Prompt, Segment, Tokens

__all__ = [
    "PromptTemplate",
    "SEPARATOR",
    "SYSTEM",
    "chunk_text",
    "split_chat_template",
    "text_tokens",
]

SYSTEM = "Use the notes to answer the question."
SEPARATOR = "\n\n"  # ends the instructions and every chunk
_MARK = "<<ragcache-context>>"


class Tokenize(Protocol):
    """See :meth:`ragcache.engine.base.Engine.tokenize`."""

    def __call__(self, text: str, *, control: bool = False) -> Tokens: ...


@dataclass(frozen=True)
class PromptTemplate:
    """The text of the chat template before the chunks and after the question.

    A prompt is ``before | chunk SEPARATOR | ... | lead Question: question after``. Its parts are
    tokenised one by one and their ids concatenated, so a chunk has the same ids in every prompt,
    and all prompts have the same prefix. Only the template's own text can become control tokens.
    ``lead``, such as instructions, is computed with the question. ``day`` is the date in the
    template's text; None if it has none.
    """

    before: str
    after: str
    tokenize: Tokenize
    day: date | None = None

    @cached_property
    def prefix(self) -> Tokens:
        return self.tokenize(self.before, control=True)

    def chunk(self, text: str) -> Tokens:
        """Ids of a chunk with its separator. Raises PromptError for a blank text."""
        return self.tokenize(chunk_text(text))

    def question(self, text: str, lead: str = "") -> Tokens:
        """Ids of ``lead``, the question and the template's text after it. Raises PromptError for a
        blank question."""
        if not text.strip():
            raise PromptError("the question is empty: ask something")
        question = f"Question: {text.strip()}"
        if lead.strip():
            question = f"{lead.strip()}{SEPARATOR}{question}"
        return text_tokens(self.tokenize, [Segment(question), Segment(self.after, "template")])

    def prompt(self, chunks: Sequence[str], question: str, lead: str = "") -> Prompt:
        """The prompt of these chunks and this question. Raises as :meth:`chunk` and
        :meth:`question`."""
        return Prompt.of(self.prefix, tuple(map(self.chunk, chunks)), self.question(question, lead))


def chunk_text(text: str) -> str:
    """The text of a chunk as it is tokenised. Raises PromptError for a blank one."""
    if not text.strip():
        raise PromptError("a chunk is empty: leave it out, or give it text")
    return text.strip() + SEPARATOR


def text_tokens(tokenize: Tokenize, run: Sequence[Segment]) -> Tokens:
    """Ids of adjacent segments that are no chunks. Only text of kind "template" becomes control
    tokens: if another text contains the name of one, each segment is tokenised alone."""
    plain = [segment.text for segment in run if segment.kind != "template"]
    if all(tokenize(text, control=True) == tokenize(text) for text in plain):
        return tokenize("".join(segment.text for segment in run), control=True)
    each = (tokenize(s.text, control=s.kind == "template") for s in run)
    return tuple(chain.from_iterable(each))


def split_chat_template(
    tokenizer: Any, tokenize: Tokenize, day: date | None = None
) -> PromptTemplate:
    """Render the tokenizer's chat template around a mark, and split the text at the mark.

    If the template contains a date, it is that of ``day``; None: of today. If it has no system
    role, the instructions are at the beginning of the user's turn; a tokenizer without a template
    gets a plain layout. Raises ModelError if the template drops, repeats or changes the user's
    text.
    """
    if not getattr(tokenizer, "chat_template", None):
        bos = tokenizer.bos_token or ""
        return PromptTemplate(f"{bos}{SYSTEM}{SEPARATOR}", "\nAnswer:", tokenize)
    source, today = tokenizer.get_chat_template(), day or date.today()
    if not uses_date(source):
        return PromptTemplate(*_split(tokenizer, source), tokenize)
    parts = _split(tokenizer, source, today)
    dated = any(parts != _split(tokenizer, source, other) for other in _OTHER_DAYS)
    return PromptTemplate(*parts, tokenize, today if dated else None)


#: Two days that every date format writes differently. If a template contains the date, its text on
#: any day differs from that on at least one of them.
_OTHER_DAYS = date(1987, 3, 7), date(1999, 10, 25)


def _split(tokenizer: Any, source: str, day: date | None = None) -> tuple[str, str]:
    """The text of a chat template before the chunks and after the question, dated ``day``."""
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
            "the chat template changes, drops or repeats the user's text, so chunks cannot be "
            "placed in it. Set another one as tokenizer.chat_template."
        )
    before, after = rendered.split(_MARK)
    return before, after


def _render(
    tokenizer: Any, source: str, day: date | None, messages: list[dict[str, str]]
) -> str | None:
    """The rendered text; None if the template refuses these roles. Raises ModelError if it is
    broken or does not end."""
    from jinja2.exceptions import TemplateError

    check_rendering(tokenizer, source, messages)  # once for all days
    source = source if day is None else with_fixed_date(source, day)
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        )
    except TemplateError:
        return None
