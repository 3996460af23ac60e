"""The vocabulary of ragcache: what every module says to every other.

Nothing here computes, and nothing here imports torch: ``import ragcache`` stays light. Texts of
documents, chunks and stop strings are :func:`ragcache.text.whole`, however they were given.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ragcache.text import whole, whole_in

if TYPE_CHECKING:
    from torch import Tensor

Tokens = tuple[int, ...]
#: Keys and values of the same tokens at one layer, each (kv_heads, tokens, head_dim).
KVPair = tuple["Tensor", "Tensor"]

#: Why a chunk's KV could not be used. Every miss is counted under one of these.
MissReason = Literal["absent", "stale", "foreign", "corrupt", "truncated", "unreadable"]


LONGEST_ID = 1000  # characters
_CONTROL = {"Cc", "Zl", "Zp"}  # categories of Unicode: controls, and what ends a line


def wrong_id(id: str) -> str | None:
    """Why a text cannot be a document's id; None where it can."""
    if not 0 < len(id) <= LONGEST_ID:
        return f"it has {len(id)} characters, and 1 to {LONGEST_ID} may be"
    if any(unicodedata.category(character) in _CONTROL for character in id):
        return "it has control characters, or ends of lines"
    return None


@dataclass(frozen=True, slots=True)
class Document:
    """A source text before it is split. ``id`` is unique in a store; the same id replaces. It is
    what :func:`wrong_id` has nothing against."""

    id: str
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _make_whole(self, "id", "text", "metadata")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: the unit of retrieval and of KV reuse."""

    document: str  # id of its document
    ordinal: int  # place in its document, from 0
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _make_whole(self, "document", "text", "metadata")

    @property
    def id(self) -> str:
        return f"{self.document}#{self.ordinal}"


def _make_whole(record: Document | Chunk, *fields: str) -> None:
    for name in fields:
        if (value := getattr(record, name)) != (made := whole_in(value)):
            object.__setattr__(record, name, made)


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved chunk and its similarity to the question (cosine, in [-1, 1])."""

    chunk: Chunk
    score: float


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Shape of a model's KV: what one token costs in a store."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str  # "float32" | "bfloat16" | "float16"

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    def layer_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of one layer for ``tokens`` tokens."""
        return 2 * self.kv_heads * self.head_dim * tokens * self.itemsize

    def chunk_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of all layers for ``tokens`` tokens."""
        return self.layers * self.layer_bytes(tokens)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything about a model that its KV depends on. Equal fingerprints, interchangeable KV.

    ``fields`` maps a field's name (``weights``, ``config``, ``tokenizer``, ``template``,
    ``dtype``, ``codec``, ``adapter``, ``format``) to its value or digest; ``name`` is for people
    and takes no part in equality. ``spec`` is the shape that its KV has, where that is known: it
    follows from the fields, and takes no part either.
    """

    fields: tuple[tuple[str, str], ...]
    name: str = field(default="", compare=False)
    spec: KVSpec | None = field(default=None, compare=False)

    @property
    def digest(self) -> bytes:
        """blake3 over the fields, 32 bytes."""
        return _digest(self.fields)

    @property
    def codec(self) -> str:
        """How the KV is stored."""
        return dict(self.fields).get("codec", "raw")

    def __str__(self) -> str:
        return f"{self.name or 'model'}@{self.digest.hex()[:8]}"


@lru_cache
def _digest(fields: tuple[tuple[str, str], ...]) -> bytes:
    from blake3 import blake3

    h = blake3()
    for key, value in sorted(fields):
        for text in (key, value):
            raw = text.encode()
            h.update(len(raw).to_bytes(4, "little") + raw)
    return h.digest()


@dataclass(frozen=True, slots=True)
class ChunkKV:
    """The KV of one chunk, as it is stored: keys before RoPE, so that a load may move them."""

    tokens: Tokens
    keys: tuple[Tensor, ...]  # per layer, (kv_heads, len(tokens), head_dim), RoPE not applied
    values: tuple[Tensor, ...]  # same shape
    sensitivity: tuple[float, ...] = ()  # per token, a float32; nothing where it was not measured

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values) or not self.keys:
            raise ValueError(f"{len(self.keys)} key layers but {len(self.values)} value layers")
        shape = self.keys[0].shape
        if any(t.shape != shape for t in (*self.keys, *self.values)):
            raise ValueError("all layers of a ChunkKV must have one shape")
        if shape[1] != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens but KV of {shape[1]}")
        if len(self.sensitivity) not in (0, len(self.tokens)):
            raise ValueError(f"{len(self.tokens)} tokens, sensitivity of {len(self.sensitivity)}")

    @property
    def spec(self) -> KVSpec:
        heads, _, dim = self.keys[0].shape
        return KVSpec(len(self.keys), heads, dim, str(self.keys[0].dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class ChunkNotes:
    """How a chunk attended to what stood before it in the prompt that its KV was cut from.

    Attention is summed over heads and layers, and over all of the chunk's tokens but in
    ``per_token``.
    """

    before: tuple[bytes, ...]  # digests of the chunks before it, in prompt order
    inter: tuple[float, ...]  # attention to each of them
    per_token: tuple[float, ...]  # attention of each of its tokens to all of them
    impact: float  # contextual impact (CCI), in [0.5, 1): how much of it looks beyond the chunk

    def __post_init__(self) -> None:
        if len(self.inter) != len(self.before):
            raise ValueError(f"{len(self.before)} chunks before, but {len(self.inter)} weights")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids in three parts. The prompt *is* the concatenation; text is never joined."""

    prefix: Tokens
    chunks: tuple[Tokens, ...]
    question: Tokens

    @property
    def tokens(self) -> Tokens:
        return sum(self.chunks, self.prefix) + self.question

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Half-open row range of every chunk in :attr:`tokens`."""
        out, at = [], len(self.prefix)
        for chunk in self.chunks:
            out.append((at, at + len(chunk)))
            at += len(chunk)
        return tuple(out)

    @property
    def question_start(self) -> int:
        return len(self.prefix) + sum(map(len, self.chunks))

    def __len__(self) -> int:
        return self.question_start + len(self.question)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode. ``temperature`` 0 is greedy; ``seed`` makes sampling repeatable."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: ask for at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if isinstance(self.stop, str) or any(not s for s in self.stop):
            raise ValueError("stop must be a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(map(whole, self.stop)))


class LayerUpload(Protocol):
    """One layer's stored KV that is being copied to a device in the background."""

    def taken(self) -> list[KVPair]:
        """Keys and values of every part on the device. Work that this thread queues on the device
        from now on waits for the copy. To be called once."""

    def finish(self) -> None:
        """Wait until the host memory has been read."""


@dataclass(frozen=True, slots=True)
class Load:
    """How one layer's stored KV came from the store. Times in seconds, of ``perf_counter``."""

    bytes: int = 0  # as they are stored
    began: float = 0.0  # when its reading began,
    ended: float = 0.0  # and when it was there


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What one layer of a fused prefill did, in seconds since the fusion began.

    The forward comes to the layer at ``at_s``, waits for its KV (``wait_s``), moves it to its place
    (``place_s``) and computes (``compute_s``); meanwhile later layers are read.
    """

    rows: int  # rows whose KV was computed, of all kinds
    through: int  # of these, those that the rest of the layer was computed for
    charged: int  # of ``rows``, those of chunks whose KV had been loaded
    load_bytes: int
    read_at_s: float  # when reading its KV began,
    read_s: float  # and how long it took
    at_s: float
    wait_s: float
    place_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """What became of one chunk of a prompt."""

    id: str
    tokens: int
    recomputed: int  # of its rows, see Report.recomputed_tokens; all of them on a miss
    charged: float  # mean share of its rows computed, over layers, in [0, 1]
    miss: str | None = None  # a MissReason, or None where its KV is stored
    cheaper: bool = False  # its KV is stored, and was not loaded: it was cheaper to compute


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with the stored KV of a prompt, and why. Times in seconds, as predicted."""

    ratio: float  # share of the loaded chunks' tokens that is recomputed
    recompute: tuple[int, ...]  # numbers, from 0, of stored chunks that are computed, not loaded
    load_s: float  # to load the others, while
    compute_s: float  # everything else is computed, with the delay that loading causes
    token_s: float  # for every token of the answer but the first
    ahead: int  # layers to load ahead of the one that computes
    sentences: tuple[str, ...] = ()  # how it came to this
    #: By number of a chunk that is loaded at a level: which one, from 1, of those that it has.
    levels: Mapping[int, int] = field(default_factory=dict)

    @property
    def prefill_s(self) -> float:
        """Until the first token: the longer of the two, for they overlap."""
        return max(self.load_s, self.compute_s)


@dataclass(frozen=True, slots=True)
class Report:
    """What was reused for an answer and what it cost. Times in seconds.

    ``recomputed_tokens`` is a mean over the layers that are not computed in full, as the ratios of
    papers are; what was really computed is ``charged_budget``.
    """

    mode: str
    parameters: Mapping[str, Any]
    prefix_tokens: int
    chunk_tokens: int
    question_tokens: int
    reused_tokens: int  # rows taken from the store and not computed
    recomputed_tokens: int  # rows that were in the store and were computed all the same
    charged_budget: float  # (sum_l |A_l & reusable| + probe_rows) / (L * reusable); 1 for full
    bytes_loaded: int
    ttft_s: float  # from the moment the chunks are known to the first token
    total_s: float  # to the last token
    chunks: tuple[ChunkReport, ...] = ()
    layers: tuple[LayerTrace, ...] = ()
    probe_rows: int = 0  # computed by a look before the work, summed over its layers
    retrieval_s: float = 0.0  # embedding the question and searching, before ttft_s begins
    fallbacks: tuple[str, ...] = ()  # what did not go as asked, and why
    no_chunks: str | None = None  # why the prompt has no chunks; None where it has some
    plan: Plan | None = None  # where the ratio was chosen to suit the machine
    computed: tuple[int, ...] = ()  # per row of the prompt, at how many layers it was computed

    @property
    def recomputed_share(self) -> float:
        """Share of all chunk tokens recomputed, those not loaded included."""
        return 1 - self.reused_tokens / max(1, self.chunk_tokens)

    @property
    def charged_share(self) -> float:
        """Share of all chunk tokens computed, mean over layers, those not loaded included.

        Equals ``charged_budget`` where every chunk was loaded.
        """
        reusable = self.reused_tokens + self.recomputed_tokens
        missed = self.chunk_tokens - reusable
        return (self.charged_budget * reusable + missed) / max(1, self.chunk_tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and the account of how it came to be."""

    text: str
    tokens: Tokens
    stopped: Literal["eos", "stop", "length"]
    passages: tuple[Passage, ...]
    prompt: Prompt
    report: Report
