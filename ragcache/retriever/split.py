"""Documents to chunks: whole sentences and paragraphs, as many as fit, counted in tokens.

The work is done by semantic-text-splitter, which looks for the largest units (headings and blocks
in Markdown, then paragraphs, lines, sentences, words, characters) that fit into a chunk; only that
it would rather cut Markdown at a link than at the end of a sentence, which is mended here where
chunks do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ragcache.errors import ConfigError
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from tokenizers import Tokenizer

#: Metadata of a document that is one chunk, however long it is.
WHOLE = {"ragcache": "whole"}

#: Changes whenever the same settings give other chunks than before.
_VERSION = 2


@dataclass(frozen=True)
class Splitter:
    """Split documents into chunks of at most ``chunk_tokens`` tokens.

    Tokens are counted as the engine will count them: each chunk alone, without special tokens, by
    the engine's own tokenizer or by a function that gives the number of tokens of a text. The same
    document and settings always give the same chunks. With ``overlap_tokens`` a chunk begins with
    up to that many tokens, in whole units, of the one before; they count towards its length.
    Without, the chunks in order are the document, but for whitespace where they meet.

    Raises ConfigError where the two numbers cannot be.
    """

    tokenizer: Tokenizer | Callable[[str], int] = field(repr=False)
    chunk_tokens: int = 512
    overlap_tokens: int = 0
    tokenizer_name: str = ""  # for describe(); a Tokenizer without a name is told by its digest

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}: it must be at least 1")
        if not 0 <= self.overlap_tokens < self.chunk_tokens:
            raise ConfigError(
                f"overlap_tokens is {self.overlap_tokens}: it must be at least 0 and below "
                f"chunk_tokens ({self.chunk_tokens})"
            )

    def split(self, document: Document) -> list[Chunk]:
        """The chunks of a document in its order, ordinals from 0; [] where it has no text.

        A document whose metadata says ``format: markdown`` is split as Markdown; one whose metadata
        has :data:`WHOLE` is not split, whatever its length. No other chunk is longer than
        ``chunk_tokens``: each is counted again, and a text that cannot be cut to fit, because a
        single character is longer, raises ConfigError. Chunks share their document's metadata.
        """
        if WHOLE.items() <= document.metadata.items():
            whole = Chunk(document.id, 0, document.text, document.metadata)
            return [whole] if document.text.strip() else []
        markdown = document.metadata.get("format") == "markdown"
        found = self._of_markdown(document.text) if markdown else self._plain.chunks(document.text)
        texts = [text for text in found if text.strip()]
        for text in texts:
            if (tokens := self.count(text)) > self.chunk_tokens:
                raise ConfigError(
                    f"{document.id}: {text[:40]!r} is {tokens} tokens and cannot be cut to "
                    f"{self.chunk_tokens}. Raise chunk_tokens."
                )
        return [Chunk(document.id, at, text, document.metadata) for at, text in enumerate(texts)]

    def describe(self) -> str:
        """All that chunks depend on besides their document; equal strings, equal chunks."""
        return (
            f"split v{_VERSION} chunk_tokens={self.chunk_tokens} "
            f"overlap_tokens={self.overlap_tokens} tokenizer={self._tokenizer_label}"
        )

    @cached_property
    def count(self) -> Callable[[str], int]:
        """Number of tokens of a text, as chunks are measured."""
        tokenizer = self._exact
        if tokenizer is None:
            assert callable(self.tokenizer)
            return self.tokenizer
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _exact(self) -> Tokenizer | None:
        """The tokenizer, free of truncation and padding, both of which would falsify counts."""
        from tokenizers import Tokenizer

        if not isinstance(self.tokenizer, Tokenizer):
            return None
        if self.tokenizer.truncation is None and self.tokenizer.padding is None:
            return self.tokenizer
        copy = Tokenizer.from_str(self.tokenizer.to_str())  # the caller's stays as it is
        copy.no_truncation()
        copy.no_padding()
        return copy

    @cached_property
    def _tokenizer_label(self) -> str:
        from xxhash import xxh3_64_hexdigest

        if self.tokenizer_name or self._exact is None:
            return self.tokenizer_name or "callable"
        return xxh3_64_hexdigest(self._exact.to_str().encode())

    def _of_markdown(self, text: str) -> Iterator[str]:
        """Blocks, and whole sentences of blocks that do not fit: where the library would cut a line
        of text at its next link or bit of code, the chunks of that line are cut again as text."""
        pieces = self._markdown.chunk_indices(text)
        if self.overlap_tokens:  # pieces begin inside one another
            yield from (piece for _, piece in pieces)
            return
        begin = 0
        for number, (start, piece) in enumerate(pieces):
            end = start + len(piece)
            last = number + 1 == len(pieces)
            if not last and "\n" not in text[end - 1 : pieces[number + 1][0] + 1]:
                continue  # the line goes on
            whole = text[pieces[begin][0] : end]
            yield from [piece] if number == begin else self._plain.chunks(whole)
            begin = number + 1

    @cached_property
    def _plain(self) -> TextSplitter:
        from semantic_text_splitter import TextSplitter

        return TextSplitter.from_callback(self.count, self.chunk_tokens, self.overlap_tokens)

    @cached_property
    def _markdown(self) -> MarkdownSplitter:
        from semantic_text_splitter import MarkdownSplitter

        return MarkdownSplitter.from_callback(self.count, self.chunk_tokens, self.overlap_tokens)
