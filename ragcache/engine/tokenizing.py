"""Texts to tokens and back, with a tokenizer of the transformers library."""

from __future__ import annotations

from typing import Any

from ragcache.engine.base import ChunkEngine
from ragcache.engine.decode import pieces
from ragcache.text import whole
from ragcache.types import Tokens


class Tokenizing(ChunkEngine):
    """A ChunkEngine with such a tokenizer."""

    tokenizer: Any

    def tokenize(self, text: str, *, control: bool = False) -> Tokens:
        encoded = self.tokenizer(
            whole(text),
            add_special_tokens=False,
            split_special_tokens=not control,
            verbose=False,  # of texts that are longer than a context: they are split
        )
        return tuple(encoded["input_ids"])

    def pieces(self, tokens: Tokens) -> list[str]:
        return pieces(self.tokenizer, tokens)
