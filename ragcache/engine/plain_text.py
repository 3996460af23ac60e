"""Tokenise documents and questions, whose text must not become control tokens."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from ragcache.errors import ModelError
from ragcache.types import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PlainText"]


class PlainText:
    """Tokenises text without recognising the added tokens of ``tokenizer``. Thread-safe.

    Tokenizers have an option to split special tokens that occur in a text. Other added tokens, such
    as ``<tool_call>`` of Qwen 2.5, control a model as well, so they are split too. Added tokens
    that consist of whitespace control nothing, and are recognised as usual.

    Raises ModelError if the tokenizer makes an added token from its plain text nevertheless.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._backend = _splitting(tokenizer.backend_tokenizer, name)
        added = self._backend.get_added_tokens_decoder().items()
        control = {number: token.content for number, token in added if token.special}
        control.pop(tokenizer.unk_token_id, None)  # unknown characters may become this token
        self._check(control, name)

    def tokens(self, text: str) -> Tokens:
        """Ids of ``text``, without BOS or EOS."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def _check(self, control: dict[int, str], name: str) -> None:
        encodings = self._backend.encode_batch(list(control.values()), add_special_tokens=False)
        unsafe = [
            text
            for (number, text), encoding in zip(control.items(), encodings, strict=True)
            if number in encoding.ids
        ]
        if unsafe:
            raise ModelError(
                f"{name} cannot be used: its tokenizer makes the control token {unsafe[0]!r} from "
                f"plain text ({len(unsafe)} of {len(control)} added tokens), so a document could "
                "end the turn or begin a tool call. Use a tokenizer.json whose vocabulary has them "
                "only as added tokens."
            )


def _splitting(backend: Any, name: str) -> Tokenizer:
    """A tokenizer with the same model and added tokens that splits added tokens in a text, except
    whitespace. It shares the model, because building one may take seconds."""
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    added = sorted(backend.get_added_tokens_decoder().items())
    for blank, run in groupby((token for _, token in added), lambda one: one.content.isspace()):
        (plain.add_tokens if blank else plain.add_special_tokens)(list(run))
    copied = {number: token.content for number, token in plain.get_added_tokens_decoder().items()}
    if copied != {number: token.content for number, token in added}:
        raise ModelError(
            f"{name} cannot be used: the ids of its tokenizer's added tokens leave gaps, so they "
            "cannot be told from text. Save the tokenizer again with save_pretrained."
        )
    plain.encode_special_tokens = True
    return plain
