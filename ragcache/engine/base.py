"""The contract of engines: encode chunks, prefill with callbacks, and decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from datetime import date

    from torch import Tensor

    from ragcache.engine.chat import ChatTemplate
    from ragcache.engine.template import PromptTemplate
    from ragcache.types import ChunkKV, Fingerprint, KVPair, KVSpec, LayerUpload, Sampling, Tokens

__all__ = [
    "AttentionCall",
    "AttentionRule",
    "ChunkEngine",
    "ComputeRows",
    "Draft",
    "Encoder",
    "Engine",
    "LayerView",
    "PrefillCallbacks",
    "Prefilled",
    "Prefiller",
    "Repair",
    "Step",
]


class LayerView(Protocol):
    """KV of one layer of the prompt, which :class:`PrefillCallbacks` receive for that layer."""

    all_rows: Tensor  # (rows,), int64: 0, 1, ..., every row of the running forward

    def place(self, start: int, parts: Sequence[KVPair]) -> None:
        """Write the stored KV of consecutive parts into the rows from ``start`` on.

        Each part is keys (before RoPE) and values, both (kv_heads, n, head_dim), on any device; it
        is not changed. Keys are rotated to the positions of their rows in float32, and cast once.
        """

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys (after RoPE) and values of ``rows``, each (kv_heads, n, head_dim), on the
        device."""

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The inverse of ``place``: keys (before RoPE) and values of rows ``start:stop``, each
        (kv_heads, n, head_dim), in host memory. Computed rows are available from
        ``PrefillCallbacks.after`` on."""


class PrefillCallbacks:
    """Decides which rows are computed. An engine calls these methods for every layer, in order."""

    def before(self, layer: int, kv: LayerView) -> Tensor:
        """Place stored KV of this layer, and return the rows to compute; by default all.

        Rows are a sorted int64 tensor on any device. They are a subset of those of the layer
        before, and include the prompt's last row. All other rows must have been placed.
        """
        return kv.all_rows

    def narrows(self, layer: int) -> bool:
        """Whether ``narrowed`` is to be called for this layer, since some rows need only their KV
        of it, not its output."""
        return False

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Receive the keys (after RoPE) and values of the computed rows, (kv_heads, n, head_dim).

        Called before the layer's attention. They are already written into the layer's KV.
        """

    def narrowed(self, layer: int) -> Tensor:
        """The rows whose output the layer computes: a subset of those of ``before``.

        Called after ``after``, for layers that ``narrows`` names.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class AttentionCall(ABC):
    """The attention of one layer for the rows that it computes."""

    layer: int
    rows: Tensor  # (n,), sorted int64: rows of the prompt that the queries belong to
    queries: Tensor  # (heads, n, head_dim), after RoPE
    keys: Tensor  # (kv_heads, keys, head_dim), after RoPE, of all rows up to the last
    values: Tensor  # same shape

    @abstractmethod
    def scores(self, queries: slice = slice(None)) -> Tensor:
        """Scaled scores before the softmax, (heads, n, keys), float32; -inf for masked keys.

        They include the model's soft cap, sliding window and mask. ``queries`` selects some of the
        ``n`` queries.
        """

    @abstractmethod
    def softmax(self, scores: Tensor) -> Tensor:
        """Attention weights of scores, same shape. With attention sinks they sum to less than 1."""

    @abstractmethod
    def attend(self, weights: Tensor) -> Tensor:
        """Weights times values, (heads, n, head_dim), in the model's dtype."""


#: Called with the attention of every layer, after ``PrefillCallbacks.after``. It returns the
#: attention's output, (heads, n, head_dim), or None for the model to compute it.
AttentionRule = Callable[[AttentionCall], "Tensor | None"]


class ComputeRows(PrefillCallbacks):
    """Computes ``rows``, sorted int64, at every layer, where all others are in place."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def before(self, layer: int, kv: LayerView) -> Tensor:
        return self.rows


class Repair(ABC):
    """Chooses rows of a prompt to compute late, by the attention of its last rows and its answer.

    Once :meth:`see` was called with the attention of every layer, :meth:`take` returns the rows
    whose stored KV matters there. They are computed over the KV in place, and the rows that looked
    at them are computed again with them.
    """

    tokens: Tokens  # of the prompt
    positions: Sequence[int]  # of its rows
    rows: Sequence[Tensor]  # what ``take`` has returned up to now
    again: int  # rows that had to be computed again
    looking: bool  # whether the next ``take`` may choose rows: if not, ``see`` does nothing
    asking: int  # rows to compute again before the first token, if any are to be computed late

    @abstractmethod
    def see(self, call: AttentionCall) -> None:
        """An AttentionRule."""

    @abstractmethod
    def take(self) -> Tensor:
        """The rows to compute now, sorted int64; none if what was seen since the last call is not
        worth it. The first call is about the question, later ones about a token of the answer."""

    @abstractmethod
    def copy(self) -> Repair:
        """A copy in the same state."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt after its prefill. Every decoding of it begins after the prompt again; with a
    ``repair``, over the rows that an earlier decoding has computed late."""

    logits: Tensor  # (vocabulary,), float32, of the prompt's last row
    kv: Any  # in the engine's own format, with rows reserved for the answer
    rows: int  # of the prompt
    next_position: int  # of the first generated token
    attend: AttentionRule | None = None  # applied to generated tokens too
    repair: Repair | None = None  # of rows to compute while the answer is decoded


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that the answer to a prompt may begin with, as in speculative decoding (Leviathan et
    al., ICML 2023, arXiv:2211.17192).

    ``logits``: :meth:`Engine.continuation_logits` of the same prompt and tokens, the last that was
    called for the prompt.
    """

    tokens: Tokens
    logits: Tensor  # (len(tokens), vocabulary)


@dataclass(frozen=True, slots=True)
class Step:
    """One decoded token. ``text`` is empty while a character or a stop string is incomplete."""

    token: int
    text: str
    stopped: Literal["", "eos", "stop", "length"] = ""


class Encoder(ABC):
    """Computes the KV of chunks."""

    name: str
    spec: KVSpec
    fingerprint: Fingerprint

    @abstractmethod
    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        """KV of every chunk, computed after the tokens ``context`` only, whose KV is left out.

        Keys are before RoPE. Chunks may be computed in one forward, so the caller limits their
        number of tokens. Raises PromptError for an empty chunk, and ContextError if ``context`` and
        a chunk together are longer than the model's context.
        """


class Prefiller(Encoder):
    """A model whose layers PrefillCallbacks can drive: what fusion needs."""

    exposes_attention: bool  # whether an AttentionRule can be used
    repairs: bool = False  # whether decoding follows :attr:`Prefilled.repair`
    #: Begins to copy stored KV to the device; thread-safe. None: the model is in host memory.
    upload: Callable[[Sequence[KVPair]], LayerUpload] | None = None

    @abstractmethod
    def prefill(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks | None = None,
        *,
        positions: Sequence[int] | None = None,
        room: int = 1,
        attend: AttentionRule | None = None,
        kept: tuple[Prefilled, int] | None = None,
        placed: Any = None,
    ) -> Prefilled:
        """Run the prompt through the model. Without ``callbacks``, every row is computed (full
        prefill).

        ``positions`` (one per token, default 0, 1, ...) must not decrease over computed rows.
        ``room`` rows are reserved for the answer. ``attend`` is called for every layer, here and
        while the answer is decoded; it needs ``exposes_attention``. ``kept``: an earlier prompt of
        this engine, and how many first rows have the same tokens and positions in both; their KV is
        copied, and ``callbacks`` do not return them. ``placed``: what :meth:`probe` returned for
        the same tokens, positions, room and kept rows, or the ``kv`` of their prefill, which is
        used up; ``callbacks`` need not place again what they placed then, but cannot read it, nor
        can ``attend`` be used.
        Raises PromptError for an empty prompt, and
        ContextError if the prompt and ``room`` exceed the context.
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
        room: int = 1,
        kept: tuple[Prefilled, int] | None = None,
    ) -> Any:
        """As ``prefill``, but for the first ``layers`` layers only, and without logits: what
        matters are the calls of ``callbacks`` and ``attend``. Returns the KV of these layers."""


class ChunkEngine(Encoder):
    """Tokenises texts into chunks and prompts, and computes the KV of chunks for a store."""

    template: PromptTemplate  # its date, if any, is that of the day on which the engine was loaded
    bos: int | None  # id of the beginning-of-text token; None if the model has none
    context_tokens: int  # maximum length of prompt and answer together

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of the model's parameters."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Number of query heads of a layer."""

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Maximum bytes of text of one token. A text of more than ``context_tokens`` times as many
        bytes exceeds the context, which is known without tokenising it."""

    @abstractmethod
    def template_on(self, day: date) -> PromptTemplate:
        """The template with the date of another day."""

    @abstractmethod
    def chat_template(self, source: str | None = None, day: date | None = None) -> ChatTemplate:
        """The model's chat template, or ``source`` in its place, with the date ``day``. Raises
        ConfigError for a ``source`` that is no valid template."""

    @abstractmethod
    def tokenize(self, text: str, *, control: bool = False) -> Tokens:
        """Ids of ``text`` without BOS or EOS.

        Names of control tokens in the text are plain text unless ``control`` is set: a document
        that contains ``<|im_end|>`` must not end the turn.
        """

    @abstractmethod
    def pieces(self, tokens: Tokens) -> list[str]:
        """The text of every token; joined, they are the text of ``tokens``.

        The text of a control token is its name. If a character has the bytes of several tokens,
        the last of them has its text, and the others have none. Incomplete bytes at the end are
        U+FFFD.
        """

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise ConfigError if this engine cannot decode so: by default, with a JSON schema."""
        if sampling.json_schema is not None:
            raise ConfigError(
                f"{self.name} does not constrain answers to a JSON schema: leave it out, or use "
                "engine embedded"
            )

    def close(self) -> None:
        """Release resources other than memory, such as connections. By default there are none."""


class Engine(ChunkEngine, Prefiller):
    """A loaded model."""

    sliding_window: int | None  # tokens that layers with a window see; None: no layer has one
    kernels: str = ""  # kernels in use for placing KV and attention, with measured times
    kernel_names: str = ""  # the same without times

    @abstractmethod
    def decode(
        self, prefilled: Prefilled, sampling: Sampling, *, draft: Draft | None = None
    ) -> Iterator[Step]:
        """Generate tokens until EOS, a stop string or ``sampling.max_tokens``. The last step has
        ``stopped`` set.

        While the tokens are those of ``draft``, its logits are used, and nothing is computed; a
        prompt with a ``repair`` makes no use of it. The tokens are those of decoding without a
        draft, up to rounding in the logits.
        """

    @abstractmethod
    def continuation_logits(self, prefilled: Prefilled, tokens: Tokens) -> Tensor:
        """Logits (len(tokens), vocabulary), float32, that predict each of ``tokens`` after the
        prompt and the tokens before it (teacher forcing), computed in one forward.

        The first row is that of the prompt. The prompt can be decoded afterwards, and this can be
        called after decoding, but of a prompt with a ``repair`` it then tells of KV that the answer
        has repaired. Raises ValueError if there are no tokens, or more than the prompt's
        prefill has reserved rows for.
        """
