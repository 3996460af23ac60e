"""Documents to chunks: whole sentences and paragraphs, as many as fit, counted in tokens.

The work is done by semantic-text-splitter, which looks for the largest units (headings and blocks
in Markdown, then paragraphs, lines, sentences, words, characters) that fit into a chunk; only that
it would rather cut Markdown at a link than at the end of a sentence, which is mended here where
chunks do not overlap. For every chunk it looks at all that is left of the text, so it is given long
texts a window at a time, and the time that a text takes grows with its length only.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ragcache.errors import ConfigError
from ragcache.types import Chunk, Document

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from tokenizers import Tokenizer

#: Metadata of a document that is one chunk, however long it is.
WHOLE = {"ragcache": "whole"}

_WINDOW = 32  # characters that the library is given at a time, for each token of a chunk
_WIDEST = 4  # windows in which a block of Markdown is looked for to begin the next one with
_PREFIX = 8  # bytes that are counted at first, for each token of a chunk
_FENCE = re.compile(
    r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<fence>`{3,}|~{3,})(?P<info>.*)$", re.MULTILINE
)
_BLOCK = re.compile(r"^#|(?<=\n\n)\S", re.MULTILINE)

#: Changes whenever the same settings give other chunks than before.
_VERSION = 2


class _Piece(NamedTuple):
    """A chunk to be: where it begins, its text, and how many tokens that is."""

    start: int
    text: str
    tokens: int


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
        ``chunk_tokens``: a word that is longer is cut between two characters, and a text that
        cannot be cut to fit, because a single character is longer, raises ConfigError. Chunks share
        their document's metadata.
        """
        return list(self.chunks(document))

    def chunks(self, document: Document) -> Iterator[Chunk]:
        """The same, one by one: whoever asks for them can do other work between two, or stop.

        What is done at a time is bounded by ``chunk_tokens``, not by the length of the document.
        """
        for at, text in enumerate(self._texts(document)):
            yield Chunk(document.id, at, text, document.metadata)

    def _texts(self, document: Document) -> Iterator[str]:
        if WHOLE.items() <= document.metadata.items():
            if document.text.strip():
                yield document.text
            return
        markdown = document.metadata.get("format") == "markdown"
        pieces = self._in_markdown(document.text) if markdown else self._in_text(document.text)
        for piece in pieces:
            if piece.tokens > self.chunk_tokens:
                raise ConfigError(
                    f"{document.id}: {piece.text[:40]!r} is {piece.tokens} tokens and cannot be "
                    f"cut to {self.chunk_tokens}. Raise chunk_tokens."
                )
            yield piece.text

    def describe(self, tokenizer: str = "") -> str:
        """All that chunks depend on besides their document; equal strings, equal chunks.

        ``tokenizer``: a label of another one, whose chunks are as good as those of this one.
        """
        return (
            f"split v{_VERSION} chunk_tokens={self.chunk_tokens} "
            f"overlap_tokens={self.overlap_tokens} tokenizer={tokenizer or self.tokenizer_label}"
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
    def tokenizer_label(self) -> str:
        """What tells its tokenizer from others."""
        from xxhash import xxh3_64_hexdigest

        if self.tokenizer_name or self._exact is None:
            return self.tokenizer_name or "callable"
        return xxh3_64_hexdigest(self._exact.to_str().encode())

    @cached_property
    def _own(self) -> int:
        """Tokens of a text without characters: what is counted with every chunk."""
        return self.count("")

    def _bounded(self, text: str) -> int:
        """Tokens of a text beyond its own, exactly where they are no more than twice those of a
        chunk: of a longer text only so much is counted that it is surely longer."""
        raw, length = text.encode(), _PREFIX * self.chunk_tokens
        while length < len(raw):
            tokens = self.count(raw[:length].decode(errors="ignore"))
            if tokens > 2 * self.chunk_tokens:
                return tokens - self._own
            length *= 2
        return self.count(text) - self._own

    def _in_text(self, text: str) -> Iterator[_Piece]:
        """A window at a time. The last chunks of a window, which what follows could change, are
        made anew with the next one, which begins where the first of them does."""
        at, window = 0, _WINDOW * self.chunk_tokens
        while at < len(text):
            end = at + window
            found = self._of_text(text[at:end])
            settled = len(found) if end >= len(text) else self._settled(found)
            if found and not settled:  # its tokens are long: it is hardly a chunk
                window *= 2
                continue
            yield from found[:settled]
            at = end if settled == len(found) else at + found[settled].start

    def _in_markdown(self, text: str) -> Iterator[_Piece]:
        """The same of Markdown, where a window begins with a block: a heading, or what stands
        behind a blank line, not inside of code. What is far longer than a window without such a
        place is split as text."""
        at, narrow = 0, _WINDOW * self.chunk_tokens
        window, code = narrow, list(_code_blocks(text))
        while at < len(text):
            end, following = at + window, _next_block(text, at + 1, code)
            if end < len(text) and following > at + _WIDEST * narrow:
                yield from self._in_text(text[at:following])
                at = following
                continue
            found = self._of_markdown(text[at:end])
            if end >= len(text):
                yield from found
                return
            settled = self._settled(found)
            while (
                settled
                and _next_block(text, at + found[settled].start, code) > at + found[settled].start
            ):
                settled -= 1
            if settled:
                yield from found[:settled]
                at, window = at + found[settled].start, narrow
            elif window < _WIDEST * narrow:
                window *= 2
            else:
                yield from self._in_text(text[at:following])
                at, window = following, narrow

    def _settled(self, found: list[_Piece]) -> int:
        """How many chunks of a window are the same whatever follows it: behind each of those is
        more of the window than two chunks hold."""
        behind = 0
        for number in reversed(range(len(found))):
            behind += found[number].tokens
            if behind > 2 * self.chunk_tokens:
                return number
        return 0

    def _of_markdown(self, text: str) -> list[_Piece]:
        """Blocks, and whole sentences of blocks that do not fit: where the library would cut a line
        of text at its next link or bit of code, the chunks of that line are cut again as text."""
        pieces = self._markdown.chunk_indices(text)
        if self.overlap_tokens:  # pieces begin inside one another
            return self._fitting(pieces)
        found: list[_Piece] = []
        begin = 0
        for number, (start, piece) in enumerate(pieces):
            end = start + len(piece)
            last = number + 1 == len(pieces)
            if not last and "\n" not in text[end - 1 : pieces[number + 1][0] + 1]:
                continue  # the line goes on
            first = pieces[begin][0]
            one = number == begin
            found += (
                self._fitting([(start, piece)]) if one else self._of_text(text[first:end], first)
            )
            begin = number + 1
        return found

    def _of_text(self, text: str, offset: int = 0) -> list[_Piece]:
        return self._fitting((offset + at, piece) for at, piece in self._plain.chunk_indices(text))

    def _fitting(self, pieces: Iterable[tuple[int, str]]) -> list[_Piece]:
        """Those that are not blank, counted. What is too long after all, for the library takes it
        that a text has no more tokens than bytes, is cut between two characters."""
        found: list[_Piece] = []
        for start, text in pieces:
            while text.strip():
                size = len(text)
                if (tokens := self.count(text)) > self.chunk_tokens:
                    size = self._beginning(text)
                    tokens = self.count(text[:size])
                found.append(_Piece(start, text[:size], tokens))
                start, text = start + size, text[size:]
        return found

    def _beginning(self, text: str) -> int:
        """How many characters of a text that is too long fit; 1 where none does."""
        sizes = range(1, len(text))
        fits = bisect_right(sizes, self.chunk_tokens, key=lambda size: self.count(text[:size]))
        while fits > 1 and self.count(text[:fits]) > self.chunk_tokens:
            fits -= 1
        return max(1, fits)

    @cached_property
    def _plain(self) -> TextSplitter:
        from semantic_text_splitter import TextSplitter

        return TextSplitter.from_callback(self._bounded, *self._capacity)

    @cached_property
    def _markdown(self) -> MarkdownSplitter:
        from semantic_text_splitter import MarkdownSplitter

        return MarkdownSplitter.from_callback(self._bounded, *self._capacity)

    @property
    def _capacity(self) -> tuple[int, int]:
        """Tokens of a chunk, and of what it has in common with the next one, beyond its own."""
        most = max(1, self.chunk_tokens - self._own)
        return most, min(most - 1, max(0, self.overlap_tokens - self._own))


def _code_blocks(text: str) -> Iterator[tuple[int, int]]:
    """Where Markdown's fenced blocks of code begin and end, in order."""
    opened: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        fence, info = line["fence"], line["info"]
        if opened is None:
            if fence[0] == "~" or "`" not in info:
                opened = line
        elif fence.startswith(opened["fence"]) and not info.strip():
            yield opened.start(), line.end()
            opened = None
    if opened is not None:
        yield opened.start(), len(text)


def _next_block(text: str, at: int, code: list[tuple[int, int]]) -> int:
    """The first place from ``at`` on at which a block of Markdown begins that is not inside of
    ``code``; the end of the text where there is none."""
    while (begin := _BLOCK.search(text, at)) is not None:
        before = bisect_left(code, begin.start(), key=lambda block: block[0])
        if not before or code[before - 1][1] <= begin.start():
            return begin.start()
        at = code[before - 1][1]
    return len(text)
