"""The contract of an engine: what fusion needs of whatever runs the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from datetime import date

    from torch import Tensor

    from ragcache.engine.template import PromptTemplate
    from ragcache.types import ChunkKV, Fingerprint, KVSpec, Sampling, Tokens


class LayerView(Protocol):
    """One layer's KV of the prompt, while :class:`PrefillCallbacks` are called for that layer."""

    all_rows: Tensor  # 0, 1, ...: every row of the running forward, int64

    def place(self, start: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write stored KV, part after part, into the rows from ``start`` on.

        Keys (before RoPE) and values of a part are (kv_heads, n, head_dim), on any device, and are
        only read; keys are rotated to the positions of their rows, in float32, and cast once.
        """

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys (after RoPE) and values of ``rows``, each (kv_heads, n, head_dim)."""

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The inverse of ``place``: keys before RoPE and values of rows ``start:stop``, on the
        host. Fresh rows are there once ``PrefillCallbacks.after`` is called."""


class Uploaded(Protocol):
    """One layer's stored KV on its way to the device."""

    def taken(self) -> list[tuple[Tensor, Tensor]]:
        """The layer on the device. What this thread computes there from now on waits for it."""

    def finish(self) -> None:
        """Wait until the host's memory has been read."""


class PrefillCallbacks:
    """Decides which rows are computed. An engine calls it around every layer, in order."""

    def before(self, layer: int, kv: LayerView) -> Tensor:
        """Place what is known of this layer; return the rows to compute, by default every one.

        Rows are a sorted int64 tensor on any device, a subset of those of the layer before, and
        end with the prompt's last row. Every row that is not returned must have been placed.
        """
        return kv.all_rows

    def narrows(self, layer: int) -> bool:
        """Whether some of those rows need no more of this layer than their fresh KV."""
        return False

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Fresh keys (after RoPE) and values of those rows, each (kv_heads, n, head_dim).

        Called before attention; they are in the layer's KV already.
        """

    def narrowed(self, layer: int) -> Tensor:
        """The rows that the rest of a layer that ``narrows`` is computed for: a subset.

        As those of ``before``. Called behind ``after``.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class AttentionCall(ABC):
    """The attention of one layer, for the rows that are computed there."""

    layer: int
    rows: Tensor  # (n,), sorted int64: rows of the prompt that the queries stand at
    queries: Tensor  # (heads, n, head_dim), after RoPE
    keys: Tensor  # (kv_heads, keys, head_dim), after RoPE: those of all rows up to the last
    values: Tensor  # same shape

    @abstractmethod
    def scores(self, queries: slice = slice(None)) -> Tensor:
        """Scaled scores before the softmax, (heads, n, keys), float32; -inf where not seen.

        A model's soft cap, window and mask are in them. ``queries`` cuts ``n`` down.
        """

    @abstractmethod
    def softmax(self, scores: Tensor) -> Tensor:
        """Attention weights of scores, same shape; a model's sinks take their part of the sum."""

    @abstractmethod
    def attend(self, weights: Tensor) -> Tensor:
        """Weights times values, (heads, n, head_dim), in the model's dtype."""


#: Sees the attention of every layer, after ``PrefillCallbacks.after``. It may return the
#: attention's output, (heads, n, head_dim), which then takes the place of the model's own.
AttentionRule = Callable[[AttentionCall], "Tensor | None"]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that is ready to be continued. Used up by one ``decode``."""

    logits: Tensor  # (vocabulary,), float32, of the prompt's last row
    kv: Any  # the engine's own; rows for the answer are reserved in it
    next_position: int  # of the first generated token
    attend: AttentionRule | None = None  # to be applied to generated tokens too


@dataclass(frozen=True, slots=True)
class Step:
    """One decoded token. ``text`` may be empty while a character or stop string is open."""

    token: int
    text: str
    stopped: Literal["", "eos", "stop", "length"] = ""


class Encoder(ABC):
    """Makes the KV of chunks."""

    name: str
    spec: KVSpec
    fingerprint: Fingerprint

    @abstractmethod
    def encode(self, chunks: Sequence[Tokens], *, behind: Tokens = ()) -> list[ChunkKV]:
        """KV of every chunk, each computed behind ``behind`` alone, whose rows are dropped.

        Keys are before RoPE. Chunks may be computed together, so a caller bounds their tokens.
        Raises PromptError for an empty chunk or one beyond the context.
        """


class Prefiller(Encoder):
    """A model whose layers PrefillCallbacks can drive: what fusion needs."""

    watchable: bool  # whether an AttentionRule sees this model's attention
    #: Begins to copy stored KV to the device, from any thread; None where that is host memory.
    upload: Callable[[Sequence[tuple[Tensor, Tensor]]], Uploaded] | None = None

    @abstractmethod
    def prefill(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks | None = None,
        *,
        positions: Sequence[int] | None = None,
        room: int = 1,
        attend: AttentionRule | None = None,
    ) -> Prefilled:
        """Run the prompt through the model. Without ``callbacks``, every row is computed (full
        prefill).

        ``positions`` (one per token, default 0, 1, ...) must not decrease over computed rows.
        ``room`` rows are reserved for the answer. ``attend`` sees the attention of every layer
        of an engine that is ``watchable``, here and while the answer is decoded. Raises
        PromptError when the prompt and ``room`` do not fit the context.
        """

    @abstractmethod
    def probe(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks,
        attend: AttentionRule,
        *,
        positions: Sequence[int],
        layers: int,
    ) -> None:
        """As ``prefill``, but stop behind layer ``layers - 1``: only what was seen remains."""


class ChunkEngine(Encoder):
    """Makes chunks and prompts of texts, and their KV: what a store is filled with."""

    template: PromptTemplate  # of the day on which it was loaded, where it has a date
    bos: int | None  # the token that begins a text, if the model has one
    context_tokens: int  # longest prompt and answer together

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many weights the model has."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Query heads of a layer."""

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """No token has more bytes of text: a longer text than ``context_tokens`` of them cannot
        fit, and need not be tokenised to know it."""

    @abstractmethod
    def template_on(self, day: date) -> PromptTemplate:
        """The template as it is on another day."""

    @abstractmethod
    def tokenize(self, text: str, *, control: bool = False) -> Tokens:
        """Ids of ``text`` alone: no BOS, no EOS, nothing added.

        The names of control tokens in it are plain text unless ``control``: a document that says
        ``<|im_end|>`` must not end its turn.
        """

    @abstractmethod
    def pieces(self, tokens: Tokens) -> list[str]:
        """The text of every token; together they are the text of ``tokens``.

        Control tokens are called by their names. A token whose bytes end inside a character has no
        text, and the one that completes it has all of it; bytes at the end that make no character
        are U+FFFD.
        """

    def close(self) -> None:
        """Give up what is held besides memory, such as connections."""


class Engine(ChunkEngine, Prefiller):
    """A loaded model."""

    sliding_window: int | None  # tokens a windowed layer sees; None if every layer sees all
    kernels: str = ""  # what KV is placed and a few rows attend with, for people
    kernel_names: str = ""  # the same without times, to compare

    @abstractmethod
    def decode(self, prefilled: Prefilled, sampling: Sampling) -> Iterator[Step]:
        """Generate until EOS, a stop string or ``sampling.max_tokens``; the last step says why."""
