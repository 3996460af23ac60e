"""Tokenise and detokenise with a tokenizer of the transformers library."""

from __future__ import annotations

import threading
from datetime import date
from functools import cached_property
from typing import Any, ClassVar

from ragcache.engine.base import ChunkEngine
from ragcache.engine.chat import ChatTemplate
from ragcache.engine.decode import pieces
from ragcache.engine.plain_text import PlainText
from ragcache.engine.template import PromptTemplate, split_chat_template
from ragcache.text import replace_surrogates
from ragcache.types import Tokens

__all__ = ["TokenizerEngine"]


_TEMPLATES_KEPT = 64


class TokenizerEngine(ChunkEngine):
    """A ChunkEngine with a tokenizer of transformers. Tokenising is thread-safe."""

    tokenizer: Any
    plain_text: PlainText  # of the same tokenizer
    #: A tokenizer keeps options of a call in its own state, and engines may share one.
    _tokenizing: ClassVar[threading.Lock] = threading.Lock()

    def template_on(self, day: date) -> PromptTemplate:
        return split_chat_template(self.tokenizer, self.tokenize, day)

    def chat_template(self, source: str | None = None, day: date | None = None) -> ChatTemplate:
        key = source, day
        if key not in self._chat_templates:
            if len(self._chat_templates) >= _TEMPLATES_KEPT:
                self._chat_templates.clear()
            self._chat_templates[key] = ChatTemplate(self.tokenizer, source, day)
        return self._chat_templates[key]

    @cached_property
    def _chat_templates(self) -> dict[tuple[str | None, date | None], ChatTemplate]:
        return {}

    def tokenize(self, text: str, *, control: bool = False) -> Tokens:
        if not control:
            return self.plain_text.tokens(replace_surrogates(text))
        with self._tokenizing:
            encoded = self.tokenizer(
                replace_surrogates(text),
                add_special_tokens=False,
                split_special_tokens=False,
                verbose=False,  # a document longer than the context is no problem: it is split
            )
        return tuple(encoded["input_ids"])

    @cached_property
    def token_bytes(self) -> int:
        return max(len(token.encode(errors="replace")) for token in self.tokenizer.get_vocab())

    def pieces(self, tokens: Tokens) -> list[str]:
        return pieces(self.tokenizer, tokens)
