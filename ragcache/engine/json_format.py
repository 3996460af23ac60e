"""Constrain answers to a JSON schema, by the library llguidance.

Of every token's logits, those of tokens that cannot follow are set to minus infinity. Whitespace is
that of Python's ``json.dumps``: models that may write any amount of it may never end.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ragcache.errors import ConfigError

__all__ = ["response_schema"]

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,  # oneOf as anyOf
}
_KEPT = 16  # compiled schemas that are kept
_FUEL, _STATES = 300_000, 30_000  # limits of llguidance: tenths of a second, and some 50 MB
_MOST_CHARACTERS = 1 << 16  # of a schema
_MOST_MULTIPLE = 9999  # of multipleOf, without its decimal point
_MOST_JOINED = 3  # patterns of a schema with allOf


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
        self._compiled: dict[str, LLMatcher] = {}  # by schema, the last used one last

    def constraint(self, schema: str) -> JsonConstraint:
        """The constraint of a schema, JSON text, for one answer. Raises ConfigError if llguidance
        is not installed, or the schema is none, cannot be enforced or costs too much."""
        tokenizer = self._prepare()
        matcher = self._compiled.pop(schema, None) or _compile(tokenizer, schema)
        self._compiled[schema] = matcher
        for earlier in list(self._compiled)[:-_KEPT]:
            del self._compiled[earlier]
        return JsonConstraint(matcher.deep_copy(), tokenizer.vocab_size)

    def _prepare(self) -> LLTokenizer:
        if self._prepared is None:
            try:
                from llguidance import LLTokenizer
            except ModuleNotFoundError as error:
                raise ConfigError(
                    "answers that follow a JSON schema need llguidance: "
                    "pip install 'ragcache-fusion[json]', or leave out the schema"
                ) from error
            described = json.loads(self._tokenizer.backend_tokenizer.to_str())
            described |= {"padding": None, "truncation": None}
            for part in "normalizer", "pre_tokenizer":
                described[part] = _without_prefix(described[part])
            try:
                self._prepared = LLTokenizer(json.dumps(described), eos_token=sorted(self._ends))
            except ValueError as error:
                raise ConfigError(
                    "answers of this model cannot follow a JSON schema: llguidance does not read "
                    f"its tokenizer ({' '.join(str(error).split())[:200]}). Leave out the schema, "
                    "or choose another model."
                ) from error
        return self._prepared


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text: an answer's first token has
    none where the schema allows none."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = dict(part)
    for name, plain in (("add_prefix_space", False), ("prepend_scheme", "never")):
        if name in changed:
            changed[name] = plain
    for name in "normalizers", "pretokenizers":
        if name in changed:
            changed[name] = [each for each in map(_without_prefix, changed[name]) if each]
    return changed


def _compile(tokenizer: LLTokenizer, schema: str) -> LLMatcher:
    from llguidance import LLMatcher
    from llguidance._lib import LLParserLimits

    _check_cost(schema)
    limits = LLParserLimits(
        initial_lexer_fuel=_FUEL, max_lexer_states=_STATES, verbose_errors=False
    )
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
    except ValueError as error:  # numbers, texts or a depth that its JSON parser does not take
        raise _refused(str(error)) from error
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not (wrong := matcher.get_error()):
        first = matcher.deep_copy()  # some limits are only met with the first token
        first.compute_bitmask()
        wrong = first.get_error()
    if wrong:
        raise _refused(wrong)
    return matcher


def _check_cost(schema: str) -> None:
    """Raise ConfigError for a schema that takes seconds to compile, which nothing could interrupt:
    a long one, large multiples, and patterns that are intersected."""
    if len(schema) > _MOST_CHARACTERS:
        raise _refused(f"it has {len(schema):,} characters, more than {_MOST_CHARACTERS:,}")
    patterns, joins, nodes = 0, False, [json.loads(schema)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            patterns += ("pattern" in node) + len(node.get("patternProperties") or ())
            joins = joins or isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1
            multiple = node.get("multipleOf")
            if isinstance(multiple, int | float) and _digits(multiple) > _MOST_MULTIPLE:
                raise _refused(f"multipleOf is {multiple}: it takes up to four digits")
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    if joins and patterns > _MOST_JOINED:
        raise _refused(f"it has allOf and {patterns} patterns, more than {_MOST_JOINED}")


def _digits(number: float) -> int:
    """The number without its decimal point."""
    exact = Decimal(str(number)).normalize()
    return int(exact.scaleb(-min(0, cast(int, exact.as_tuple().exponent))))


def _refused(reason: str) -> ConfigError:
    reason = " ".join(reason.split())[:300].rstrip(".")
    return ConfigError(
        f"answers cannot be made to follow this JSON schema: {reason}. Correct or simplify the "
        "schema."
    )


class JsonConstraint:
    """What the tokens of one answer may be, while it is decoded."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

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
        """Note the answer's next token, which :meth:`allowed` has left. Raises as that does."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise _refused(error)
