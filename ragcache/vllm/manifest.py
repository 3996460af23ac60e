"""The manifest of a request to vLLM: where the prompt's chunks are, and how to fuse them.

It is sent as ``kv_transfer_params["ragcache"]``, with a prompt of token ids. A worker uses it only
if the token ids have the digest in the manifest.
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

__all__ = ["Manifest"]

FIELD = "ragcache"  # of kv_transfer_params
VERSION = 1
Task = Literal["fuse", "keep"]

_DIGEST = re.compile("[0-9a-f]{64}")
_TICKET = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parts of a prompt, and what to do with it.

    ``fuse``: load the stored KV of the chunks, and recompute tokens as ``mode`` says. ``keep``: the
    prompt is one chunk after its context; return the chunk's KV under ``ticket``. Raises
    PromptError for invalid fields.
    """

    task: Task
    model: str  # digest of the fingerprint, hex
    tokens: str  # digest of the prompt's ids, hex
    prefix: int  # tokens; for ``keep``, those before the chunk
    chunks: tuple[int, ...]  # tokens of each chunk
    question: int  # tokens
    mode: str = "full"  # as parsed by :func:`ragcache.blend.blender`
    compiled: str = "prefix"  # name of the encoding context of the chunks
    behind: Tokens | None = None  # tokens of that context; None: the prompt's prefix
    tenant: str = ""
    ticket: str = ""  # names the reply, 32 hex digits; empty: no reply

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
                    f"a manifest has an invalid {what}: {self!r}. Make it with Manifest.fuse or "
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
        """A manifest to fuse ``prompt`` by ``mode``; ``model`` is the fingerprint's digest."""
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
        """A manifest to return the KV of ``chunk``, computed after the context ``behind``."""
        tokens = digest_tokens(behind + chunk).hex()
        return cls("keep", model.hex(), tokens, len(behind), (len(chunk),), 0, ticket=ticket)

    @classmethod
    def read(cls, params: Mapping[str, Any] | None) -> Manifest | None:
        """The manifest in a request; None without one. Raises PromptError if it is malformed."""
        if not params or FIELD not in params:
            return None
        given = params[FIELD]
        if not isinstance(given, Mapping):
            raise PromptError(f"{FIELD} must be an object, not {type(given).__name__}")
        fields = dict(given)
        if (version := fields.pop("version", None)) != VERSION:
            raise PromptError(
                f"the manifest has version {version}, but this ragcache reads version {VERSION}"
            )
        try:
            for name, kind in _FIELD_TYPES.items():
                if name in fields and type(fields[name]) is not kind:
                    raise TypeError(f"{name} must be of type {kind.__name__}")
            for name in ("chunks", "behind"):
                if fields.get(name) is not None:
                    fields[name] = _numbers(name, fields[name])
            return cls(**fields)
        except TypeError as error:
            raise PromptError(
                f"the manifest cannot be read: {error}. Send the result of Manifest.params."
            ) from error

    def params(self) -> dict[str, Any]:
        """The manifest as JSON for ``kv_transfer_params``."""
        return {FIELD: {"version": VERSION, **asdict(self)}}

    def prompt(self, tokens: Sequence[int]) -> Prompt:
        """Split ``tokens`` into the prompt's parts. Raises PromptError for other tokens."""
        ids = tuple(tokens)
        if len(ids) != len(self):
            raise PromptError(
                f"the prompt has {len(ids)} tokens, but its manifest is for {len(self)}"
            )
        if digest_tokens(ids).hex() != self.tokens:
            raise PromptError(
                "the prompt's tokens are not those that its manifest was made for: send the same "
                "token ids, not text"
            )
        at, chunks = self.prefix, []
        for size in self.chunks:
            chunks.append(ids[at : at + size])
            at += size
        return Prompt.of(ids[: self.prefix], tuple(chunks), ids[at:])


_FIELD_TYPES = {
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
