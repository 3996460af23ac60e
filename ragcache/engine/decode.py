"""Streaming decode from a prefilled prompt: sampling, stop strings, whole characters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ragcache.engine.base import Prefilled, Step
from ragcache.types import Sampling, Tokens

#: Logits (vocabulary,) behind one more token at a position.
Next = Callable[[Prefilled, int, int], Tensor]


def decode(
    following: Next, tokenizer: Any, ends: Collection[int], prefilled: Prefilled, sampling: Sampling
) -> Iterator[Step]:
    """See :meth:`Engine.decode`; ``ends`` as for :class:`Speller`."""
    pick, speller = _Sampler(sampling), Speller(tokenizer, ends, sampling)
    logits, position = prefilled.logits, prefilled.next_position
    while True:
        step = speller.push(pick(logits))
        yield step
        if step.stopped:
            return
        logits, position = following(prefilled, step.token, position), position + 1


class Speller:
    """Gives an answer's tokens their text, up to the end that ``sampling`` sets.

    ``ends`` are the tokens that end an answer; the one that does is a step without text. Bytes that
    do not make a whole character by the end are left out.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], sampling: Sampling) -> None:
        self._ends = ends
        self._texts = TokenTexts(tokenizer, control=False)
        self._stops = StopStrings(tuple(sampling.stop))
        self._left = sampling.max_tokens

    def push(self, token: int) -> Step:
        """The next token's step; nothing may follow one that has ``stopped``."""
        self._left -= 1
        if token in self._ends:
            return Step(token, self._stops.flush(), "eos")
        text, hit = self._stops.push(self._texts.push(token))
        if hit:
            return Step(token, text, "stop")
        if not self._left:
            return Step(token, text + self._stops.flush(), "length")
        return Step(token, text)


class TokenTexts:
    """The text of every token of a sequence, in order; empty while a character is open.

    ``control``: whether control tokens have their names as their text, or none.

    A decoder with byte tokens spells a run of them anew with each: bytes that were a character are
    none with one more behind them. What was given stays given then, and the tokens that have had no
    text yet are spelled by themselves.
    """

    def __init__(self, tokenizer: Any, *, control: bool) -> None:
        self._backend, self._control = tokenizer.backend_tokenizer, control
        self._stream = DecodeStream(skip_special_tokens=not control)
        self._open: list[int] = []  # tokens that have had no text yet

    def push(self, token: int) -> str:
        self._open.append(token)
        try:
            text = self._stream.step(self._backend, token)
        except Exception as error:  # tokenizers has no class of its own for it
            if not str(error).startswith(_RESPELLED):
                raise
            self._stream = DecodeStream(skip_special_tokens=not self._control)
            steps = [self._stream.step(self._backend, token) for token in self._open]
            text = "".join(filter(None, steps))
        if text:
            self._open.clear()
        return text or ""


_RESPELLED = "Invalid prefix encountered"
_COLDEST = 1e-5  # below it, logits that are divided by it are too large to compare


class _Sampler:
    """Greedy at temperature 0 or next to it; else temperature, then top-p, then a seeded draw."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.warpers: list[Any] = []
        self.greedy = sampling.temperature < _COLDEST
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.random = torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        if self.greedy:
            return int(logits.argmax())
        scores = logits[None].cpu()
        for warp in self.warpers:
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.random))


class StopStrings:
    """Lets text through until a stop string appears; holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string ended it (it is not shown)."""
        self.held += text
        hits = [at for s in self.stops if (at := self.held.find(s)) >= 0]
        if hits:
            shown, self.held = self.held[: min(hits)], ""
            return shown, True
        keep = max((_overlap(self.held, s) for s in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def pieces(tokenizer: Any, tokens: Tokens) -> list[str]:
    """See :meth:`Engine.pieces`."""
    texts = TokenTexts(tokenizer, control=True)
    made = [texts.push(token) for token in tokens]
    if made and not made[-1]:
        made[-1] = "\ufffd"
    return made


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """End tokens of the generation config and the tokenizer."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    ends.add(tokenizer.eos_token_id)
    return {e for e in ends if e is not None}
