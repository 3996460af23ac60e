"""The manifest of a request to vLLM: where the prompt's parts are, and how to fuse them.

It is sent as ``kv_transfer_params["ragcache"]``, with a prompt of token ids. A worker uses it only
if the token ids have the digest in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, Literal, get_args

from ragcache.errors import PromptError
from ragcache.planning.context import EncodingContext
from ragcache.store.key import digest_tokens
from ragcache.store.tenants import TENANT
from ragcache.types import Part, Prompt, Tokens

__all__ = ["Manifest"]

FIELD = "ragcache"  # of kv_transfer_params
VERSION = 3
Task = Literal["fuse", "keep"]

_DIGEST = re.compile("[0-9a-f]{64}")
_TICKET = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parts of a prompt, and what to do with it.

    ``fuse``: load the stored KV of the parts, and recompute tokens as ``mode`` says. ``keep``: the
    prompt is one chunk after its context; return the chunk's KV under ``ticket``. Raises
    PromptError for invalid fields.
    """

    task: Task
    model: str  # digest of the fingerprint, hex
    tokens: str  # digest of the prompt's ids, hex
    parts: tuple[int, ...]  # tokens of each part
    chunks: tuple[int, ...]  # indices of the parts that are chunks, ascending
    tails: tuple[Tokens, ...]  # per chunk, the stored chunk's ids after those in the prompt
    mode: str = "full"  # as parsed by :func:`ragcache.blend.blender`
    compiled: str = "prefix"  # name of the encoding context of the chunks
    behind: Tokens | None = None  # tokens of that context; None: those before the first chunk
    most: int | None = None  # see EncodingContext
    tenant: str = ""
    ticket: str = ""  # names the reply, 32 hex digits; empty: no reply

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.chunks, self.chunks[1:], strict=False))
        known = not self.chunks or (self.chunks[0] >= 0 and self.chunks[-1] < len(self.parts))
        last = len(self.parts) - 1
        keeps = self.task == "keep"
        for name, needs, fine in (
            ("task", f"must be one of {', '.join(get_args(Task))}", self.task in get_args(Task)),
            ("model", "must have 64 hex digits", _DIGEST.fullmatch(self.model)),
            ("tokens", "must have 64 hex digits", _DIGEST.fullmatch(self.tokens)),
            (
                "parts",
                "must have the size of each part, at least 1",
                min(self.parts, default=0) > 0,
            ),
            ("chunks", "must have indices of parts, in ascending order", ascending and known),
            (
                "chunks",
                "must have the last part alone for keep",
                not keeps or self.chunks == (last,),
            ),
            ("parts", "must have a context and a chunk for keep", not keeps or last <= 1),
            ("tails", "must have a list for each chunk", len(self.tails) == len(self.chunks)),
            ("tails", "must be empty for keep", not keeps or not any(self.tails)),
            ("tenant", "must be a tenant's name", not self.tenant or TENANT.fullmatch(self.tenant)),
            (
                "ticket",
                "must have 32 hex digits",
                not self.ticket or _TICKET.fullmatch(self.ticket),
            ),
            ("ticket", "must be given for keep", self.ticket or not keeps),
        ):
            if not fine:
                raise PromptError(
                    f"a manifest is invalid: {name} {needs}. Make it with Manifest.fuse or "
                    "Manifest.keep."
                )

    @property
    def reuse_end(self) -> int:
        """The end of the last chunk, or without chunks the start of the last part.

        A worker computes the tokens after it as vLLM does, or loads KV that is the same.
        """
        return sum(self.parts[: self.chunks[-1] + 1 if self.chunks else -1])

    def encoding(self, prompt: Prompt) -> EncodingContext:
        """What the chunks of ``prompt`` were computed after."""
        behind = prompt.prefix if self.behind is None else self.behind
        return EncodingContext(self.compiled, behind, self.most)

    def __len__(self) -> int:
        return sum(self.parts)

    @classmethod
    def fuse(
        cls,
        prompt: Prompt,
        mode: str,
        model: bytes,
        *,
        encoding: EncodingContext | None = None,
        tenant: str = "",
        ticket: str = "",
    ) -> Manifest:
        """A manifest to fuse ``prompt`` by ``mode``; ``model`` is the fingerprint's digest.
        ``encoding``: what the chunks were computed after; None: what precedes the first one."""
        how = encoding or EncodingContext("prefix", prompt.prefix)
        return cls(
            "fuse",
            model.hex(),
            digest_tokens(prompt.tokens).hex(),
            tuple(len(part.tokens) for part in prompt.parts),
            tuple(i for i, part in enumerate(prompt.parts) if part.is_chunk),
            tuple(
                () if part.stored is None else part.stored[len(part.tokens) :]
                for part in prompt.parts
                if part.is_chunk
            ),
            mode,
            how.mode,
            None if how.context == prompt.prefix else how.context,
            how.most,
            tenant,
            ticket,
        )

    @classmethod
    def keep(cls, chunk: Tokens, behind: Tokens, model: bytes, ticket: str) -> Manifest:
        """A manifest to return the KV of ``chunk``, computed after the context ``behind``."""
        tokens = digest_tokens(behind + chunk).hex()
        parts = (len(behind), len(chunk)) if behind else (len(chunk),)
        return cls("keep", model.hex(), tokens, parts, (len(parts) - 1,), ((),), ticket=ticket)

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
                f"the manifest has version {version}, but this ragcache reads version {VERSION}: "
                "use the same release of ragcache in the vLLM server and in what sends requests "
                "to it"
            )
        try:
            for name, kind in _FIELD_TYPES.items():
                if name in fields and type(fields[name]) is not kind:
                    raise TypeError(f"{name} must be of type {kind.__name__}")
            for name in ("parts", "chunks"):
                fields[name] = _numbers(name, fields.get(name))
            if fields.get("behind") is not None:
                fields["behind"] = _numbers("behind", fields["behind"])
            if type(fields.get("most")) not in (int, NoneType):
                raise TypeError("most must be of type int")
            tails = _list("tails", "lists of numbers", fields.get("tails"))
            fields["tails"] = tuple(_numbers("each of tails", tail) for tail in tails)
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
        tails = dict(zip(self.chunks, self.tails, strict=True))
        parts, start = [], 0
        for index, size in enumerate(self.parts):
            part = ids[start : start + size]
            tail = tails.get(index)
            parts.append(Part(part, tail is not None, part + tail if tail else None))
            start += size
        return Prompt(tuple(parts))


_FIELD_TYPES = {
    "task": str,
    "model": str,
    "tokens": str,
    "mode": str,
    "compiled": str,
    "tenant": str,
    "ticket": str,
}


def _numbers(name: str, given: object) -> tuple[int, ...]:
    numbers = _list(name, "numbers", given)
    if any(type(n) is not int or not 0 <= n < 1 << 32 for n in numbers):
        raise TypeError(f"{name} must be a list of numbers from 0 to 2^32 - 1")
    return tuple(numbers)


def _list(name: str, items: str, given: object) -> Sequence[Any]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} must be a list of {items}")
    return given
