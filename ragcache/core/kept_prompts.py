"""Keep the KV of the last chats, so that their next turns compute only what is new."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from ragcache.blend.base import Blender
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Prefilled
from ragcache.planning.context import EncodingContext
from ragcache.types import Prompt, Tokens

__all__ = ["KeptPrompts"]


#: Rows more than the store has, from which those of another chat are used.
_LEAST = 64


class KeptRows(NamedTuple):
    """The first rows of an earlier prompt."""

    prefilled: Prefilled
    rows: int


_Use = tuple[str, Blender, EncodingContext]  # tenant, method and context: only equal ones share KV


@dataclass(frozen=True, slots=True)
class _Kept:
    use: _Use
    tokens: Tokens  # of the prompt and its answer, as far as they are computed
    asked: int  # tokens of the prompt
    stored: int  # first tokens of the prompt whose KV the store has, too
    prefilled: Prefilled
    size: int  # bytes


class KeptPrompts:
    """KV of the latest prompts and answers of chats, as it was computed, of at most ``most_bytes``.

    A prompt whose first tokens are those of a kept one reuses its rows as they are: what fusion
    approximated stays approximated, and nothing is loaded or computed again. Only prompts of the
    same tenant and method are used. Thread-safe.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[_Kept] = []  # the latest last
        self._lock = threading.Lock()

    def find(
        self, request: PromptRequest, encoding: EncodingContext, tenant: str
    ) -> KeptRows | None:
        """The kept prompt that shares most first rows with that of ``request``."""
        if not self._suits(request):
            return None
        with self._lock:
            use = tenant, request.blender, encoding
            kept = [one for one in self._kept if one.use == use]
        found = [KeptRows(one.prefilled, _usable(request.prompt, one)) for one in kept]
        best = max(found, key=lambda one: one.rows, default=None)
        return best if best is not None and best.rows else None

    def keep(
        self,
        request: PromptRequest,
        encoding: EncodingContext,
        tenant: str,
        prefilled: Prefilled,
        answer: Tokens,
        size: int,
    ) -> None:
        """Keep a prompt with its ``answer``, whose KV has ``size`` bytes. Its earlier turns are
        dropped, and then the oldest prompts that do not fit."""
        if not self._suits(request) or size > self.most_bytes:
            return
        tokens = request.prompt.tokens + answer[:-1]  # the last token's row is not computed
        asked, stored = len(request.prompt), len(request.prompt.prefix)
        use = tenant, request.blender, encoding
        new = _Kept(use, tokens, asked, stored, prefilled, size)
        with self._lock:
            kept = [one for one in self._kept if not _continues(new, one)] + [new]
            while sum(one.size for one in kept) > self.most_bytes:
                kept.pop(0)
            self._kept = kept

    def clear(self) -> None:
        with self._lock:
            self._kept = []

    def _suits(self, request: PromptRequest) -> bool:
        return (
            self.most_bytes > 0
            and request.is_chat
            and request.misses == "exact"
            and request.blender.keeps_rows
        )


def _usable(prompt: Prompt, kept: _Kept) -> int:
    """How many first rows of ``prompt`` are those of ``kept``: not the last one, and no part of a
    chunk, unless it is the earlier answer, whose last token has no row, that has become one. Unless
    it is a next turn, they must be worth it: no text is looked up or stored behind them, and all
    chats begin with the template's own text."""
    pairs = zip(prompt.tokens[:-1], kept.tokens, strict=False)
    rows = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if rows == len(kept.tokens):
        return rows
    rows = next((start for start, stop in prompt.spans if start < rows < stop), rows)
    stops = (stop for _, stop in prompt.part_spans if stop <= min(rows, kept.stored))
    new = rows - max(stops, default=0)
    return rows if rows >= kept.asked - 1 or new >= _LEAST else 0


def _continues(new: _Kept, old: _Kept) -> bool:
    return new.use == old.use and new.tokens[: len(old.tokens)] == old.tokens
