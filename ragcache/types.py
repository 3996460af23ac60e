"""The data types that ragcache's modules share.

This module does not import torch, so that ``import ragcache`` is fast. Unpaired surrogates in texts
of documents, chunks and stop strings are replaced (:func:`ragcache.text.replace_surrogates`).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, takewhile
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ragcache.text import replace_surrogates, replace_surrogates_in

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Answer",
    "Certificate",
    "Chunk",
    "ChunkKV",
    "ChunkNotes",
    "ChunkReport",
    "Disagreement",
    "Document",
    "Explanation",
    "Fingerprint",
    "KVPair",
    "KVSpec",
    "LayerLoad",
    "LayerTrace",
    "LayerUpload",
    "MissReason",
    "Part",
    "PartReport",
    "Passage",
    "Plan",
    "Progress",
    "Prompt",
    "Report",
    "START_TOKENS",
    "Sampling",
    "Segment",
    "StageProgress",
    "Tokens",
    "invalid_id_reason",
]

Tokens = tuple[int, ...]
#: Keys and values of the same tokens at one layer, each (kv_heads, tokens, head_dim).
KVPair = tuple["Tensor", "Tensor"]

#: Called with the number of items that are done and their number in all.
Progress = Callable[[int, int], None]

#: Called with the name of a stage, how many of its items are done, and their number in all.
StageProgress = Callable[[str, int, int], None]

#: Why a chunk's KV could not be used; every miss is counted under one of these.
MissReason = Literal["absent", "stale", "foreign", "corrupt", "truncated", "unreadable"]


MAX_ID_LENGTH = 1000  # characters
_CONTROL = {"Cc", "Zl", "Zp"}  # Unicode categories: control characters and line separators


def invalid_id_reason(id: str) -> str | None:
    """Why ``id`` cannot be a document's id, as a clause for an error message; None if it can."""
    if not 0 < len(id) <= MAX_ID_LENGTH:
        return f"it has {len(id)} characters, and 1 to {MAX_ID_LENGTH} are allowed"
    if any(unicodedata.category(character) in _CONTROL for character in id):
        return "it contains control characters or line breaks"
    return None


@dataclass(frozen=True, slots=True)
class Document:
    """A source text before it is split into chunks.

    ``id`` is unique in a store: adding a document with a known id replaces that document. See
    :func:`invalid_id_reason` for valid ids.
    """

    id: str
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _replace_surrogates_of(self, "id", "text", "metadata")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: the unit of retrieval and of KV reuse."""

    document: str  # id of its document
    ordinal: int  # index in its document, from 0
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _replace_surrogates_of(self, "document", "text", "metadata")

    @property
    def id(self) -> str:
        """The document's id, ``#``, and the ordinal."""
        return f"{self.document}#{self.ordinal}"


def _replace_surrogates_of(record: Document | Chunk, *fields: str) -> None:
    for name in fields:
        if (value := getattr(record, name)) != (made := replace_surrogates_in(value)):
            object.__setattr__(record, name, made)


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved chunk and its cosine similarity to the question, in [-1, 1]."""

    chunk: Chunk
    score: float


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The shape of a model's KV cache, which determines the bytes of a token in a store."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str  # "float32" | "bfloat16" | "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    def layer_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens at one layer."""
        return 2 * self.kv_heads * self.head_dim * tokens * self.itemsize

    def chunk_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens at all layers."""
        return self.layers * self.layer_bytes(tokens)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything about a model that its KV depends on: equal fingerprints, interchangeable KV.

    ``fields`` are pairs of a field's name (``weights``, ``config``, ``tokenizer``, ``template``,
    ``dtype``, ``codec``, ``adapter``, ``format``) and its value or digest. ``name`` is for display,
    and ``spec`` is the shape of the KV if known, which follows from the fields: neither takes part
    in comparisons.
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

    def with_codec(self, codec: str) -> Fingerprint:
        """That of the same model, whose KV is stored with ``codec``."""
        fields = {**dict(self.fields), "codec": codec}
        return replace(self, fields=tuple(sorted(fields.items())))

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
    """The KV of one chunk. Keys are those before RoPE, so that any position can be applied."""

    tokens: Tokens
    keys: tuple[Tensor, ...]  # per layer, (kv_heads, len(tokens), head_dim), RoPE not applied
    values: tuple[Tensor, ...]  # same shape
    sensitivity: tuple[float, ...] = ()  # per token, float32 values; empty if not measured

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values) or not self.keys:
            raise ValueError(f"{len(self.keys)} key layers but {len(self.values)} value layers")
        shape = self.keys[0].shape
        if any(t.shape != shape for t in (*self.keys, *self.values)):
            raise ValueError("all layers of a ChunkKV must have the same shape")
        if shape[1] != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens but KV of {shape[1]} tokens")
        if len(self.sensitivity) not in (0, len(self.tokens)):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.sensitivity)} sensitivities")

    @property
    def spec(self) -> KVSpec:
        """The shape of this KV."""
        heads, _, dim = self.keys[0].shape
        return KVSpec(len(self.keys), heads, dim, str(self.keys[0].dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class ChunkNotes:
    """How a chunk attended to the chunks before it, in the prompt that its KV was taken from.

    Attention weights are summed over heads and layers, and (except in ``per_token``) over the
    chunk's tokens. From Cache-Craft (Agarwal et al., SIGMOD 2025, arXiv:2502.15734).
    """

    before: tuple[bytes, ...]  # digests of the chunks before it, in prompt order
    inter: tuple[float, ...]  # attention to each of these chunks
    per_token: tuple[float, ...]  # attention of each token to all of these chunks
    impact: float  # contextual impact (CCI), in [0.5, 1): attention to tokens outside the chunk

    def __post_init__(self) -> None:
        if len(self.inter) != len(self.before):
            raise ValueError(f"{len(self.before)} chunks before, but {len(self.inter)} weights")


#: What a piece of a prompt's text is: the chat template's own text, the only one that may contain
#: control tokens; somebody's text, which is computed in the prompt; or a chunk, whose KV may have
#: been computed elsewhere.
SegmentKind = Literal["template", "text", "chunk"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt's text, as it stands there.

    ``stored``: for a chunk that was found in a longer text, the text that the stored chunk was
    tokenised from, if it is not ``text``. The tokens of ``text`` are its first ones.
    """

    text: str
    kind: SegmentKind = "text"
    id: str = ""  # of a chunk, for the report
    stored: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The token ids of a part of a prompt, which were tokenised alone: a chunk, or other text.

    ``stored``: of a chunk that was found in a longer text, the ids of the stored chunk, if it has
    more than ``tokens``. Those are its first ones.
    """

    tokens: Tokens
    is_chunk: bool = False
    stored: Tokens | None = None

    def __post_init__(self) -> None:
        if self.stored is not None and self.stored[: len(self.tokens)] != self.tokens:
            raise ValueError("a part must have the first tokens of the stored chunk")


@dataclass(frozen=True)
class Prompt:
    """Token ids in parts, chunks and other text, in any order; texts are never joined.

    Parts without tokens are left out.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not all(part.tokens for part in self.parts):
            kept = tuple(part for part in self.parts if part.tokens)
            object.__setattr__(self, "parts", kept)

    @classmethod
    def of(cls, prefix: Tokens, chunks: Iterable[Tokens], question: Tokens) -> Prompt:
        """A prompt of text, chunks, and text."""
        return cls((Part(prefix), *(Part(chunk, True) for chunk in chunks), Part(question)))

    @cached_property
    def tokens(self) -> Tokens:
        return tuple(chain.from_iterable(part.tokens for part in self.parts))

    @cached_property
    def part_spans(self) -> tuple[tuple[int, int], ...]:
        """The half-open range of each part in :attr:`tokens`."""
        ends = tuple(accumulate(len(part.tokens) for part in self.parts))
        return tuple(zip((0, *ends), ends, strict=False))

    @cached_property
    def chunks(self) -> tuple[Tokens, ...]:
        return tuple(part.tokens for part in self.parts if part.is_chunk)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The range of each chunk in :attr:`tokens`."""
        return tuple(
            s for s, part in zip(self.part_spans, self.parts, strict=True) if part.is_chunk
        )

    @cached_property
    def texts(self) -> tuple[Tokens, ...]:
        """The parts that are no chunks."""
        return tuple(part.tokens for part in self.parts if not part.is_chunk)

    @cached_property
    def text_spans(self) -> tuple[tuple[int, int], ...]:
        """The range of each of :attr:`texts` in :attr:`tokens`."""
        return tuple(
            s for s, part in zip(self.part_spans, self.parts, strict=True) if not part.is_chunk
        )

    @property
    def lead(self) -> tuple[Tokens, ...]:
        """The texts before the first chunk."""
        before = takewhile(lambda part: not part.is_chunk, self.parts)
        return tuple(part.tokens for part in before)

    @property
    def prefix(self) -> Tokens:
        """The tokens before the first chunk, or without chunks those before the question."""
        return self.tokens[: self.spans[0][0] if self.chunks else self.question_start]

    @property
    def question(self) -> Tokens:
        """The last text, after all chunks: with the question, for which the answer is computed."""
        return self.tokens[self.question_start :]

    @property
    def question_start(self) -> int:
        """Index of the first token of :attr:`question` in :attr:`tokens`."""
        asks = bool(self.parts) and not self.parts[-1].is_chunk
        return self.part_spans[-1][0] if asks else len(self)

    def __len__(self) -> int:
        return len(self.tokens)

    def continued(self, tokens: Tokens) -> Prompt:
        """The prompt with more tokens of its last text; after a last chunk, they are a text."""
        if not self.parts or self.parts[-1].is_chunk:
            return Prompt((*self.parts, Part(tokens)))
        *parts, last = self.parts
        return Prompt((*parts, replace(last, tokens=last.tokens + tokens)))


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decoding options. ``temperature`` 0 is greedy; ``seed`` makes sampling reproducible.

    ``json_schema``: what the answer conforms to, unless ``max_tokens`` or a stop string ends it
    early: a JSON schema, as a mapping or as JSON text. Raises ValueError for values out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    json_schema: str | Mapping[str, Any] | None = None  # as JSON text, once it is checked

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: ask for at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if isinstance(self.stop, str) or any(not s for s in self.stop):
            raise ValueError("stop must be a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(map(replace_surrogates, self.stop)))
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))

    @property
    def schema_text(self) -> str | None:
        """``json_schema`` as JSON text."""
        assert self.json_schema is None or isinstance(self.json_schema, str)
        return self.json_schema


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(found, Mapping):
            raise ValueError("it is no object")
        return json.dumps(replace_surrogates_in(dict(found)), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"json_schema is no JSON schema: {error}. Give an object, such as "
            '{"type": "object", "properties": {"name": {"type": "string"}}}'
        ) from error


class LayerUpload(Protocol):
    """One layer's stored KV that is being copied to a device in the background."""

    def taken(self) -> list[KVPair]:
        """Keys and values of every part on the device. Work that this thread queues on the device
        from now on waits for the copy. To be called once."""

    def finish(self) -> None:
        """Wait until the host memory has been read."""


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """How one layer's KV was read from the store. Times are in seconds of ``perf_counter``."""

    bytes: int = 0  # encoded, as in the store
    began: float = 0.0  # start of the read
    ended: float = 0.0  # end of the read


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """The timeline of one layer of a fused prefill, in seconds since the prefill began.

    The prefill reaches the layer at ``at_s``, waits for its KV (``wait_s``), copies it into the
    prompt's cache with RoPE applied (``place_s``), and computes the layer (``compute_s``). Later
    layers are read at the same time.
    """

    rows: int  # rows whose KV was computed: of chunks, prefix and question
    through: int  # of ``rows``, those for which the rest of the layer was computed too
    charged: int  # of ``rows``, those of chunks whose KV had been loaded
    load_bytes: int  # encoded, as in the store
    read_at_s: float  # start of reading its KV
    read_s: float  # duration of reading its KV
    at_s: float
    wait_s: float
    place_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """How one chunk of a prompt was provided."""

    id: str
    tokens: int
    recomputed: int  # tokens, see Report.recomputed_tokens; all of them on a miss
    #: Share of its rows that were computed, mean over layers, in [0, 1]; of both prefills, in
    #: [1, 2], if the answer was escalated.
    charged: float
    miss: str | None = None  # a MissReason, or None if its KV is stored
    cheaper: bool = False  # stored, but computed because that is cheaper than loading


@dataclass(frozen=True, slots=True)
class PartReport:
    """How one part of a prompt is provided, a chunk or other text."""

    kind: Literal["text", "chunk"]
    name: str  # the id of a chunk
    tokens: int
    loaded: int  # tokens whose KV is loaded; the method recomputes some of a chunk's
    reason: str = ""  # why it is not loaded, in words


@dataclass(frozen=True, slots=True)
class Plan:
    """The controller's decision for a prompt, and its reasons. Times are predictions in seconds."""

    ratio: float  # share of the loaded chunks' tokens that is recomputed
    recompute: tuple[int, ...]  # indices of stored chunks that are computed instead of loaded
    load_s: float  # to load the other chunks
    compute_s: float  # to compute the rest, including the slowdown that loading causes
    token_s: float  # for each token of the answer after the first
    ahead: int  # layers to load ahead of the one that is computed
    sentences: tuple[str, ...] = ()  # the reasons
    #: By index of a chunk that is loaded in another codec: which one, from 1, of its alternatives.
    levels: Mapping[int, int] = field(default_factory=dict)
    overlap: bool = True  # whether loading and computing do: False where a probe needs all first

    @property
    def prefill_s(self) -> float:
        """Time to the first token."""
        if self.overlap:
            return max(self.load_s, self.compute_s)
        return self.load_s + self.compute_s


#: First tokens of an answer that are compared where :data:`Disagreement` is ``tokens``.
START_TOKENS = 16
#: When two answers disagree: their normalised texts differ, or one of their first 16 tokens does.
Disagreement = Literal["answer", "tokens"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the calibration of a store promises about an answer.

    With ``confidence``, at most a share ``epsilon`` of answers in ``mode`` at ``ratio`` or more
    disagree with full prefill's; see :class:`ragcache.core.calibration.Calibration`. An answer is
    ``escalated`` if its first token's ``margin`` is below the least one: its prompt was prefilled
    again, in full, before anything was streamed.
    """

    covered: bool  # whether the promise is made for this answer
    reason: str  # why not, in words; empty if it is
    epsilon: float
    confidence: float
    disagreement: Disagreement
    mode: str
    ratio: float | None  # None: the mode takes none
    questions: int  # that it was calibrated on
    date: str  # of the calibration, in ISO format
    least_margin: float = 0.0  # 0: no answer is escalated
    #: The highest logit of the first token after the fused prefill minus the second highest; None
    #: where no answer is escalated, or this one is not covered, or reused nothing.
    margin: float | None = None
    escalated: bool = False
    discarded_s: float = 0.0  # of ``ttft_s``, until it was escalated: the fused prefill


@dataclass(frozen=True, slots=True)
class Report:
    """What was reused for an answer, and what it cost. Times are in seconds.

    ``recomputed_tokens`` is a mean over the layers that are not computed in full, which is what
    papers call the ratio. ``charged_budget`` counts all layers. Where the answer was escalated (see
    :class:`Certificate`), what was computed counts both prefills, what was loaded is of the first,
    and the layers are those of the second.
    """

    mode: str
    parameters: Mapping[str, Any]
    prefix_tokens: int
    chunk_tokens: int
    question_tokens: int
    reused_tokens: int  # loaded from the store and not recomputed
    recomputed_tokens: int  # loaded from the store and recomputed
    charged_budget: float  # (sum_l |A_l & reusable| + probe_rows) / (L * reusable); 1 for full
    bytes_loaded: int  # encoded, as in the store
    ttft_s: float  # from when the chunks are known to the first token
    total_s: float  # from when the chunks are known to the last token
    chunks: tuple[ChunkReport, ...] = ()
    parts: tuple[PartReport, ...] = ()  # the same of every part of the prompt, in order
    layers: tuple[LayerTrace, ...] = ()
    loaded_text_tokens: int = 0  # of texts whose KV was not computed: loaded, or kept
    kept_tokens: int = 0  # first tokens whose KV is that of an earlier turn of the chat
    probe_rows: int = 0  # computed by a probe, or again after late ones, summed over layers
    late_tokens: int = 0  # of those recomputed: for the question, and while the answer was decoded
    late_s: float = 0.0  # of ttft_s, computing what the question asked for
    retrieval_s: float = 0.0  # embedding the question and searching, before ttft_s begins
    fallbacks: tuple[str, ...] = ()  # deviations from the request, and their reasons
    no_chunks: str | None = None  # why the prompt has no chunks; None if it has some
    plan: Plan | None = None  # if the ratio was chosen automatically (mode auto)
    certificate: Certificate | None = None  # if the store has a calibration
    computed: tuple[int, ...] = ()  # per row of the prompt, the layers at which it was computed

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.prefix_tokens + self.chunk_tokens + self.question_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt, of chunks and other text, that were loaded from the store and not
        recomputed."""
        return self.reused_tokens + self.loaded_text_tokens

    @property
    def escalated(self) -> bool:
        """Whether the prompt was prefilled again, in full; see :class:`Certificate`."""
        return self.certificate is not None and self.certificate.escalated

    @property
    def recomputed_share(self) -> float:
        """Share of all chunk tokens that were computed: recomputed ones and those of misses."""
        return 1 - self.reused_tokens / max(1, self.chunk_tokens)

    @property
    def charged_share(self) -> float:
        """Share of all chunk tokens that were computed, mean over layers, including misses; 1 more
        if the answer was escalated.

        Equals ``charged_budget`` if every chunk was loaded.
        """
        reusable = self.reused_tokens + self.recomputed_tokens
        missed = (self.chunk_tokens - reusable) * (1 + self.escalated)
        return (self.charged_budget * reusable + missed) / max(1, self.chunk_tokens)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would be loaded for a request, if it were answered now."""

    mode: str
    parts: tuple[PartReport, ...]  # of the prompt, in order
    passages: tuple[Passage, ...] = ()  # of the prompt's chunks
    no_chunks: str | None = None  # why the prompt has no chunks; None if it has some
    plan: Plan | None = None  # if the ratio is chosen automatically

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(part.tokens for part in self.parts)

    @property
    def loaded(self) -> int:
        """Tokens whose KV would be loaded; the method recomputes some of the chunks'."""
        return sum(part.loaded for part in self.parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, its passages and prompt, and a report of what was reused."""

    text: str
    tokens: Tokens
    stopped: Literal["eos", "stop", "length"]
    passages: tuple[Passage, ...]
    prompt: Prompt
    report: Report
