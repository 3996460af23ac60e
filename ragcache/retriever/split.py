"""Split documents into chunks of whole sentences and paragraphs, measured in tokens.

The work is done by semantic-text-splitter, which fills chunks with the largest units that fit
(headings and blocks in Markdown, then paragraphs, lines, sentences, words, characters). It cuts
Markdown at links rather than at ends of sentences, which is corrected here if chunks do not
overlap. Its time per chunk grows with the length of the remaining text; so it is given long texts
in windows, which makes the total time linear in their length.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ragcache.errors import ConfigError
from ragcache.retriever.markdown_blocks import code_blocks, next_block
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from tokenizers import Tokenizer

__all__ = ["Splitter", "WHOLE"]

#: Metadata of a document that is one chunk, whatever its length.
WHOLE = {"ragcache": "whole"}

_WINDOW = 32  # characters per window, for each token of a chunk
_MAX_WINDOWS = 4  # windows within which the next one must find a Markdown block to start at
_PREFIX = 8  # bytes that are counted first, for each token of a chunk
#: Formats whose text has the marks of Markdown.
_MARKDOWN = {"markdown", "docx", "pptx"}
#: Opening brackets and quotes. The library counts those that follow a sentence without a space, as
#: is usual in Chinese and Japanese, to that sentence (UAX 29, rule SB9).
_OPENING = "「『（〈《【〔“‘"

#: Must change whenever the same settings give different chunks than before.
_VERSION = 3


class _Piece(NamedTuple):
    """A future chunk: its offset in characters, its text, and its length in tokens."""

    start: int
    text: str
    tokens: int


@dataclass(frozen=True)
class Splitter:
    """Split documents into chunks of at most ``chunk_tokens`` tokens.

    Tokens are counted as the engine counts them: each chunk by itself, without special tokens.
    ``tokenizer`` is the engine's own, or a function that returns the number of tokens of a text.
    Splitting is deterministic. With ``overlap_tokens``, a chunk begins with up to that many tokens
    (in whole units) of the chunk before it, which count towards its length. Without it, the chunks
    joined in order are the document, except for whitespace between them.

    Raises ConfigError unless ``chunk_tokens`` >= 1 and 0 <= ``overlap_tokens`` < ``chunk_tokens``.
    """

    tokenizer: Tokenizer | Callable[[str], int] = field(repr=False)
    chunk_tokens: int = 512
    overlap_tokens: int = 0
    tokenizer_name: str = ""  # for describe(); without it, a Tokenizer's digest

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}: it must be at least 1")
        if not 0 <= self.overlap_tokens < self.chunk_tokens:
            raise ConfigError(
                f"overlap_tokens is {self.overlap_tokens}: it must be at least 0 and below "
                f"chunk_tokens ({self.chunk_tokens})"
            )

    def split(self, document: Document) -> list[Chunk]:
        """The chunks of a document in order, with ordinals from 0; [] if it has no text.

        A document whose metadata has ``format: markdown`` (or docx, pptx) is split as Markdown; one
        whose metadata contains :data:`WHOLE` is not split. No other chunk is longer than
        ``chunk_tokens``: longer words are cut between characters. Raises ConfigError for a single
        character that is longer.
        Chunks share their document's metadata.
        """
        return list(self.chunks(document))

    def chunks(self, document: Document) -> Iterator[Chunk]:
        """As :meth:`split`, one chunk at a time.

        The work per chunk is bounded by ``chunk_tokens``, not by the length of the document.
        """
        for at, text in enumerate(self._texts(document)):
            yield Chunk(document.id, at, text, document.metadata)

    def _texts(self, document: Document) -> Iterator[str]:
        if WHOLE.items() <= document.metadata.items():
            if document.text.strip():
                yield document.text
            return
        markdown = document.metadata.get("format") in _MARKDOWN
        pieces = (
            self._markdown_windows(document.text) if markdown else self._text_windows(document.text)
        )
        for piece in pieces:
            if piece.tokens > self.chunk_tokens:
                raise ConfigError(
                    f"{document.id}: {piece.text[:40]!r} is {piece.tokens} tokens and cannot be "
                    f"cut to {self.chunk_tokens}. Raise chunk_tokens."
                )
            yield piece.text

    def describe(self, tokenizer: str = "") -> str:
        """Everything that chunks depend on besides their document: equal strings, equal chunks.

        ``tokenizer`` replaces the label of the tokenizer, for one that gives equal chunks.
        """
        return (
            f"split v{_VERSION} chunk_tokens={self.chunk_tokens} "
            f"overlap_tokens={self.overlap_tokens} tokenizer={tokenizer or self.tokenizer_label}"
        )

    @cached_property
    def count(self) -> Callable[[str], int]:
        """The function that counts the tokens of a text."""
        tokenizer = self._counting_tokenizer
        if tokenizer is None:
            assert callable(self.tokenizer)
            return self.tokenizer
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _counting_tokenizer(self) -> Tokenizer | None:
        """The tokenizer without truncation and padding, which would falsify counts."""
        from tokenizers import Tokenizer

        if not isinstance(self.tokenizer, Tokenizer):
            return None
        if self.tokenizer.truncation is None and self.tokenizer.padding is None:
            return self.tokenizer
        copy = Tokenizer.from_str(self.tokenizer.to_str())  # the caller's is not changed
        copy.no_truncation()
        copy.no_padding()
        return copy

    @cached_property
    def tokenizer_label(self) -> str:
        """A name that identifies the tokenizer."""
        from xxhash import xxh3_64_hexdigest

        if self.tokenizer_name or self._counting_tokenizer is None:
            return self.tokenizer_name or "callable"
        return xxh3_64_hexdigest(self._counting_tokenizer.to_str().encode())

    @cached_property
    def _empty_tokens(self) -> int:
        """Tokens of the empty text, which are counted with every chunk."""
        return self.count("")

    def _count_bounded(self, text: str) -> int:
        """Tokens of a text, not counting those of the empty text.

        Exact up to twice ``chunk_tokens``; a longer text is only counted until it is certain to be
        longer than that.
        """
        raw, length = text.encode(), _PREFIX * self.chunk_tokens
        while length < len(raw):
            tokens = self.count(raw[:length].decode(errors="ignore"))
            if tokens > 2 * self.chunk_tokens:
                return tokens - self._empty_tokens
            length *= 2
        return self.count(text) - self._empty_tokens

    def _text_windows(self, text: str) -> Iterator[_Piece]:
        """Split a window at a time.

        The last chunks of a window, which following text could change, are dropped; the next window
        begins where the first of them did.
        """
        at, window = 0, _WINDOW * self.chunk_tokens
        while at < len(text):
            end = at + window
            found = self._split_text(text[at:end])
            settled = len(found) if end >= len(text) else self._count_settled(found)
            if found and not settled:  # long tokens: the window is hardly a chunk
                window *= 2
                continue
            yield from found[:settled]
            at = end if settled == len(found) else at + found[settled].start

    def _markdown_windows(self, text: str) -> Iterator[_Piece]:
        """Split Markdown a window at a time.

        A window begins at a block: a heading, or text after a blank line, outside of code. A part
        that is much longer than a window and contains no such place is split as text.
        """
        at, narrow = 0, _WINDOW * self.chunk_tokens
        window, code = narrow, list(code_blocks(text))
        while at < len(text):
            end, following = at + window, next_block(text, at + 1, code)
            if end < len(text) and following > at + _MAX_WINDOWS * narrow:
                yield from self._text_windows(text[at:following])
                at = following
                continue
            found = self._split_markdown(text[at:end])
            if end >= len(text):
                yield from found
                return
            settled = self._count_settled(found)
            while (
                settled
                and next_block(text, at + found[settled].start, code) > at + found[settled].start
            ):
                settled -= 1
            if settled:
                yield from found[:settled]
                at, window = at + found[settled].start, narrow
            elif window < _MAX_WINDOWS * narrow:
                window *= 2
            else:
                yield from self._text_windows(text[at:following])
                at, window = following, narrow

    def _count_settled(self, found: list[_Piece]) -> int:
        """How many chunks of a window cannot depend on the text after it.

        Those are the chunks that are followed by more than two chunks' worth of tokens.
        """
        following = 0
        for number in reversed(range(len(found))):
            following += found[number].tokens
            if following > 2 * self.chunk_tokens:
                return number
        return 0

    def _split_markdown(self, text: str) -> list[_Piece]:
        """Chunks of blocks, and of whole sentences of blocks that do not fit.

        Where the library cut a line at a link or code span, the line is split again as text.
        """
        pieces = self._markdown.chunk_indices(text)
        if self.overlap_tokens:  # pieces overlap
            return self._fit(pieces)
        found: list[_Piece] = []
        begin = 0
        for number, (start, piece) in enumerate(pieces):
            end = start + len(piece)
            last = number + 1 == len(pieces)
            if not last and "\n" not in text[end - 1 : pieces[number + 1][0] + 1]:
                continue  # the line continues
            first = pieces[begin][0]
            one = number == begin
            found += (
                self._fit([(start, piece)]) if one else self._split_text(text[first:end], first)
            )
            begin = number + 1
        return found

    def _split_text(self, text: str, offset: int = 0) -> list[_Piece]:
        pieces = self._plain.chunk_indices(text)
        return self._fit((offset + at, piece) for at, piece in self._opened(pieces))

    def _opened(self, pieces: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The pieces with opening brackets at the end of one moved to the next, if they fit."""
        for number, (start, text) in enumerate(pieces[:-1]):
            after, following = pieces[number + 1]
            kept = text.rstrip(_OPENING)
            opening = text[len(kept) :]
            if opening and kept and start + len(text) == after:
                if self.count(opening + following) <= self.chunk_tokens:
                    pieces[number] = start, kept
                    pieces[number + 1] = after - len(opening), opening + following
        return pieces

    def _fit(self, pieces: Iterable[tuple[int, str]]) -> list[_Piece]:
        """The pieces that are not blank, with their tokens counted.

        A piece can still be too long, because the library assumes at most one token per byte: it is
        cut between characters.
        """
        found: list[_Piece] = []
        for start, text in pieces:
            while text.strip():
                size = len(text)
                if (tokens := self.count(text)) > self.chunk_tokens:
                    size = self._prefix_length(text)
                    tokens = self.count(text[:size])
                found.append(_Piece(start, text[:size], tokens))
                start, text = start + size, text[size:]
        return found

    def _prefix_length(self, text: str) -> int:
        """How many characters of a text that is too long fit; at least 1."""
        sizes = range(1, len(text))
        fits = bisect_right(sizes, self.chunk_tokens, key=lambda size: self.count(text[:size]))
        while fits > 1 and self.count(text[:fits]) > self.chunk_tokens:
            fits -= 1
        return max(1, fits)

    @cached_property
    def _plain(self) -> TextSplitter:
        from semantic_text_splitter import TextSplitter

        return TextSplitter.from_callback(self._count_bounded, *self._capacity)

    @cached_property
    def _markdown(self) -> MarkdownSplitter:
        from semantic_text_splitter import MarkdownSplitter

        return MarkdownSplitter.from_callback(self._count_bounded, *self._capacity)

    @property
    def _capacity(self) -> tuple[int, int]:
        """Most tokens of a chunk and of an overlap, not counting those of the empty text."""
        most = max(1, self.chunk_tokens - self._empty_tokens)
        return most, min(most - 1, max(0, self.overlap_tokens - self._empty_tokens))
