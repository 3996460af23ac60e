"""Decode a prefilled prompt token by token: sampling, stop strings and incomplete characters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ragcache.engine.base import Draft, Prefilled, Step
from ragcache.engine.json_format import JsonConstraint
from ragcache.types import Sampling, Tokens

__all__ = ["IncrementalDetokenizer"]

#: Called with one more token and its position; returns the logits (vocabulary,) after it.
_NextLogits = Callable[[int, int], Tensor]


def decode(
    following: _NextLogits,
    tokenizer: Any,
    ends: Collection[int],
    prefilled: Prefilled,
    sampling: Sampling,
    constraint: JsonConstraint | None = None,
) -> Iterator[Step]:
    """See :meth:`Engine.decode`; ``ends`` as for :class:`IncrementalDetokenizer`. ``constraint``:
    that of ``sampling.json_schema``."""
    sample, detokenizer = _Sampler(sampling), IncrementalDetokenizer(tokenizer, ends, sampling)
    logits, position = prefilled.logits, prefilled.next_position
    while True:
        token = sample(logits if constraint is None else constraint.allowed(logits))
        if constraint is not None:
            constraint.accept(token)
        step = detokenizer.push(token)
        yield step
        if step.stopped:
            return
        logits, position = following(step.token, position), position + 1


class DraftReader:
    """The logits of a draft, for as long as an answer has the draft's tokens."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._next = 0  # index of the answer's next token; that of the last one at the end

    def after(self, token: int) -> Tensor | None:
        """The logits (vocabulary,) after the answer's next token. None if the draft does not have
        them, for this token and all later ones."""
        last = len(self._draft.tokens) - 1
        if self._next >= last or self._draft.tokens[self._next] != token:
            self._next = last
            return None
        self._next += 1
        return self._draft.logits[self._next]


class IncrementalDetokenizer:
    """Turns the tokens of an answer into steps, until ``sampling`` ends it.

    ``ends`` are the tokens that end an answer; such a token has no text. Bytes of an incomplete
    character at the end are left out.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], sampling: Sampling) -> None:
        self._ends = ends
        self._texts = _TokenTexts(tokenizer, control=False)
        self._stops = StopStrings(tuple(sampling.stop))
        self._left = sampling.max_tokens

    def push(self, token: int) -> Step:
        """The step of the next token. No token may follow a step that has ``stopped`` set."""
        self._left -= 1
        if token in self._ends:
            return Step(token, self._stops.flush(), "eos")
        text, hit = self._stops.push(self._texts.push(token))
        if hit:
            return Step(token, text, "stop")
        if not self._left:
            return Step(token, text + self._stops.flush(), "length")
        return Step(token, text)


class _TokenTexts:
    """The text of every token of a sequence, in order; empty while a character is incomplete.

    ``control``: whether the text of a control token is its name; otherwise it is empty.

    Tokenizers with byte tokens decode consecutive ones together: a further byte can make bytes
    invalid that were a character before. Text that was returned is not changed; the tokens that
    have had no text yet are then decoded alone.
    """

    def __init__(self, tokenizer: Any, *, control: bool) -> None:
        self._backend, self._control = tokenizer.backend_tokenizer, control
        self._stream = DecodeStream(skip_special_tokens=not control)
        self._pending: list[int] = []  # tokens that have had no text yet

    def push(self, token: int) -> str:
        self._pending.append(token)
        try:
            text = self._stream.step(self._backend, token)
        except Exception as error:  # tokenizers raises a plain Exception
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = DecodeStream(skip_special_tokens=not self._control)
            steps = [self._stream.step(self._backend, token) for token in self._pending]
            text = "".join(filter(None, steps))
        if text:
            self._pending.clear()
        return text or ""


_INVALID_PREFIX = "Invalid prefix encountered"
_MIN_TEMPERATURE = 1e-5  # logits divided by a lower temperature overflow


class _Sampler:
    """Greedy below the minimum temperature; else temperature, top-p and a seeded draw."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.warpers: list[Any] = []
        self.greedy = sampling.temperature < _MIN_TEMPERATURE
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
    """Passes text on until a stop string appears, and holds back what may be its beginning."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown, and whether a stop string, which is left out, ended it."""
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
        """The text that was held back, at the end of the answer."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def pieces(tokenizer: Any, tokens: Tokens) -> list[str]:
    """See :meth:`ragcache.engine.base.ChunkEngine.pieces`."""
    decoder = _TokenTexts(tokenizer, control=True)
    texts = [decoder.push(token) for token in tokens]
    if texts and not texts[-1]:
        texts[-1] = "\ufffd"
    return texts


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids of the end tokens in the model's generation config and in the tokenizer."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    ends.add(tokenizer.eos_token_id)
    return {e for e in ends if e is not None}
