"""What a request to vLLM says about its prompt: which of its tokens are which chunk, and how to
fuse them.

It travels as ``kv_transfer_params["ragcache"]``, beside a prompt that is token ids. A worker uses
it only where the ids are those that it was made for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ragcache.errors import PromptError
from ragcache.store.key import digest_tokens
from ragcache.store.tenants import TENANT
from ragcache.types import Prompt, Tokens

FIELD = "ragcache"  # of kv_transfer_params
VERSION = 1
Task = Literal["fuse", "keep"]

_DIGEST = re.compile("[0-9a-f]{64}")
_TICKET = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A prompt's parts, and what is to be done with it.

    ``fuse``: place the stored KV of the chunks and compute what ``mode`` says. ``keep``: the prompt
    is one chunk behind what it is computed behind; hand its KV back under ``ticket``.
    """

    task: Task
    model: str  # digest of the fingerprint, hex
    tokens: str  # digest of the prompt's ids, hex
    prefix: int  # tokens; of ``keep``, what the chunk stands behind
    chunks: tuple[int, ...]  # tokens of each
    question: int  # tokens
    mode: str = "full"  # as :func:`ragcache.blend.blender` reads it
    compiled: str = "prefix"  # the compile mode of the chunks
    behind: Tokens | None = None  # what that computes them behind; None: the prompt's prefix
    tenant: str = ""
    ticket: str = ""  # names what is handed back, 32 hex digits; empty: nothing is

    def __post_init__(self) -> None:
        sizes = (self.prefix, *self.chunks, self.question)
        for what, fine in (
            ("task", self.task in get_args(Task)),
            ("model", _DIGEST.fullmatch(self.model)),
            ("tokens", _DIGEST.fullmatch(self.tokens)),
            ("prefix, chunks or question", min(sizes) >= 0 and all(self.chunks)),
            ("question", self.question > 0 or self.task == "keep"),
            ("chunks", len(self.chunks) == 1 or self.task == "fuse"),
            ("tenant", not self.tenant or TENANT.fullmatch(self.tenant)),
            ("ticket", not self.ticket or _TICKET.fullmatch(self.ticket)),
            ("ticket", self.ticket or self.task == "fuse"),
        ):
            if not fine:
                raise PromptError(
                    f"a manifest cannot have this {what}: {self!r}. Make it with Manifest.fuse or "
                    "Manifest.keep."
                )

    @property
    def question_start(self) -> int:
        return self.prefix + sum(self.chunks)

    def __len__(self) -> int:
        return self.question_start + self.question

    @classmethod
    def fuse(
        cls,
        prompt: Prompt,
        mode: str,
        model: bytes,
        *,
        compiled: str = "prefix",
        behind: Tokens | None = None,
        tenant: str = "",
        ticket: str = "",
    ) -> Manifest:
        """Fuse ``prompt`` by ``mode``, with KV of the model whose fingerprint digest is given."""
        return cls(
            "fuse",
            model.hex(),
            digest_tokens(prompt.tokens).hex(),
            len(prompt.prefix),
            tuple(map(len, prompt.chunks)),
            len(prompt.question),
            mode,
            compiled,
            behind,
            tenant,
            ticket,
        )

    @classmethod
    def keep(cls, chunk: Tokens, behind: Tokens, model: bytes, ticket: str) -> Manifest:
        """Hand back the KV of ``chunk``, computed behind ``behind``."""
        tokens = digest_tokens(behind + chunk).hex()
        return cls("keep", model.hex(), tokens, len(behind), (len(chunk),), 0, ticket=ticket)

    @classmethod
    def read(cls, params: Mapping[str, Any] | None) -> Manifest | None:
        """What a request says; None where it says nothing. PromptError for what is malformed."""
        if not params or FIELD not in params:
            return None
        given = params[FIELD]
        if not isinstance(given, Mapping):
            raise PromptError(f"{FIELD} must be an object, not {type(given).__name__}")
        fields = dict(given)
        if (version := fields.pop("version", None)) != VERSION:
            raise PromptError(f"a manifest of version {version}; this ragcache reads {VERSION}")
        try:
            for name, kind in _KINDS.items():
                if name in fields and type(fields[name]) is not kind:
                    raise TypeError(f"{name} must be of type {kind.__name__}")
            for name in ("chunks", "behind"):
                if fields.get(name) is not None:
                    fields[name] = _numbers(name, fields[name])
            return cls(**fields)
        except TypeError as error:
            raise PromptError(
                f"a manifest cannot be read: {error}. Send what Manifest.params gives."
            ) from error

    def params(self) -> dict[str, Any]:
        """For ``kv_transfer_params``: plain JSON."""
        return {FIELD: {"version": VERSION, **asdict(self)}}

    def prompt(self, tokens: Sequence[int]) -> Prompt:
        """The prompt in its parts. PromptError where ``tokens`` are not those that were meant."""
        ids = tuple(tokens)
        if len(ids) != len(self):
            raise PromptError(
                f"the prompt has {len(ids)} tokens, its manifest speaks of {len(self)}"
            )
        if digest_tokens(ids).hex() != self.tokens:
            raise PromptError(
                "the prompt's tokens are not those that its manifest was made for: send token ids, "
                "not text, and as they were digested"
            )
        at, chunks = self.prefix, []
        for size in self.chunks:
            chunks.append(ids[at : at + size])
            at += size
        return Prompt(ids[: self.prefix], tuple(chunks), ids[at:])


_KINDS = {
    "task": str,
    "model": str,
    "tokens": str,
    "prefix": int,
    "question": int,
    "mode": str,
    "compiled": str,
    "tenant": str,
    "ticket": str,
}


def _numbers(name: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} must be a list of numbers")
    if any(type(n) is not int or not 0 <= n < 1 << 32 for n in given):
        raise TypeError(f"{name} must be a list of numbers from 0 to 2^32 - 1")
    return tuple(given)
