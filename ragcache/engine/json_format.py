"""Constrain answers to a JSON schema, by the library llguidance.

Of every token's logits, those of tokens that cannot follow are set to minus infinity. Whitespace is
that of Python's ``json.dumps``: models that may write any amount of it may never end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragcache.errors import ConfigError

__all__ = ["response_schema"]

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

_WHITESPACE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


def response_schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema of a ``response_format`` of OpenAI's API; None for text. Raises ConfigError
    for any other form."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            return schema
    raise ConfigError(
        'response_format is one of {"type": "text"}, {"type": "json_object"} and {"type": '
        '"json_schema", "json_schema": {"name": NAME, "schema": SCHEMA}}, with an object as the '
        "schema: correct it or leave it out"
    )


class JsonFormats:
    """Constraints for the answers of one model, whose tokenizer is prepared when the first is
    needed: a second, for a vocabulary of 150,000 tokens."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._prepared: LLTokenizer | None = None

    def constraint(self, schema: str) -> JsonConstraint:
        """The constraint of a schema, JSON text, for one answer. Raises ConfigError if llguidance
        is not installed, or the schema is none or cannot be enforced."""
        return JsonConstraint(self._prepare(), schema)

    def _prepare(self) -> LLTokenizer:
        if self._prepared is None:
            try:
                from llguidance.hf import from_tokenizer
            except ModuleNotFoundError as error:
                raise ConfigError(
                    "answers that follow a JSON schema need llguidance: "
                    "pip install 'ragcache-fusion[json]', or leave out the schema"
                ) from error
            self._prepared = from_tokenizer(self._tokenizer, eos_token=sorted(self._ends))
        return self._prepared


class JsonConstraint:
    """What the tokens of one answer may be, while it is decoded."""

    def __init__(self, tokenizer: LLTokenizer, schema: str) -> None:
        from llguidance import LLMatcher

        self._vocabulary = tokenizer.vocab_size
        self._matcher = LLMatcher(
            tokenizer,
            LLMatcher.grammar_from_json_schema(schema, overrides=_WHITESPACE),
            log_level=0,
        )
        self._check()

    def allowed(self, logits: Tensor) -> Tensor:
        """``logits`` (vocabulary,), minus infinity for the tokens that cannot come next. Raises
        ConfigError if the schema is too complex."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(mask, bitorder="little")[: self._vocabulary].astype(bool)
        allowed = np.zeros(len(logits), bool)
        allowed[: len(bits)] = bits[: len(logits)]
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Note the answer's next token, which :meth:`allowed` has left."""
        self._matcher.consume_token(token)

    def _check(self) -> None:
        if error := self._matcher.get_error():
            reason = " ".join(error.split())[:300]
            raise ConfigError(
                f"answers cannot be made to follow this JSON schema: {reason}. Correct or simplify "
                "the schema."
            )
