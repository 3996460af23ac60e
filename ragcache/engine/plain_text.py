"""Texts of others to tokens: documents and questions, which must not make control tokens."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from ragcache.errors import ModelError
from ragcache.types import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PlainText:
    """Tokenizes text in which no added token of ``tokenizer`` has a meaning.

    A tokenizer splits the added tokens that it calls special where it is asked to. Others, such as
    ``<tool_call>`` of Qwen 2.5, control a model no less, so they are split too. Added tokens of
    whitespace alone control nothing, and stay what the tokenizer makes of them. Thread-safe.

    Raises ModelError where the tokenizer makes an added token out of its text all the same.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._backend = _splitting(tokenizer.backend_tokenizer, name)
        added = self._backend.get_added_tokens_decoder().items()
        control = {number: token.content for number, token in added if token.special}
        control.pop(tokenizer.unk_token_id, None)  # text with unknown characters has it by right
        self._check(control, name)

    def tokens(self, text: str) -> Tokens:
        """Ids of ``text`` alone, nothing added."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def _check(self, control: dict[int, str], name: str) -> None:
        every = self._backend.encode_batch(list(control.values()), add_special_tokens=False)
        made = [
            text for (i, text), found in zip(control.items(), every, strict=True) if i in found.ids
        ]
        if made:
            raise ModelError(
                f"{name} cannot be used: its tokenizer makes the control token {made[0]!r} of "
                f"plain text ({len(made)} of {len(control)} added tokens), so a document could end "
                "its turn or begin a tool call. Use a tokenizer.json whose vocabulary has them as "
                "added tokens alone."
            )


def _splitting(backend: Any, name: str) -> Tokenizer:
    """A tokenizer of the same model and added tokens that splits all but those of whitespace. It
    shares the model, which may take seconds to make anew."""
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    added = sorted(backend.get_added_tokens_decoder().items())
    for blank, run in groupby((token for _, token in added), lambda one: one.content.isspace()):
        (plain.add_tokens if blank else plain.add_special_tokens)(list(run))
    ours = {number: token.content for number, token in plain.get_added_tokens_decoder().items()}
    if ours != {number: token.content for number, token in added}:
        raise ModelError(
            f"{name} cannot be used: the ids of its tokenizer's added tokens leave gaps, so they "
            "cannot be told from text. Save the tokenizer anew with save_pretrained."
        )
    plain.encode_special_tokens = True
    return plain
