"""The contract of a blender: where stored KV goes, and which of its rows are computed afresh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ragcache.errors import ConfigError
from ragcache.types import KVPair as KVPair

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.engine.base import AttentionRule
from ragcache.types import ChunkNotes, Load, Prompt

#: What a chunk's stored KV must have been computed behind: what the store's compile mode says (the
#: prompt's prefix alone, as a rule), everything that stands before the chunk in this prompt, the
#: company that it had in an earlier prompt (a variant), or nothing stored is used at all.
Behind = Literal["compiled", "context", "variant", "nothing"]
Positions = Literal["consecutive", "overlapping"]


class KVSource(Protocol):
    """Stored KV of a prompt's loaded parts, asked for layer by layer, in order, once each."""

    def start(self, layers: Sequence[int]) -> None:
        """Begin to load: these layers, in rising order, will be asked for, and no others."""

    def layer(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Per loaded part, keys before RoPE and values, each (kv_heads, n, head_dim).

        They are to be read only.
        """

    def load(self, layer: int) -> Load:
        """How a layer that was asked for came here."""


@dataclass(frozen=True)
class Layout:
    """A prompt with what is known of it. Row sets are sorted int64 tensors on the CPU."""

    prompt: Prompt
    loaded: tuple[bool, ...]  # per chunk: is its KV at hand?
    prefix_loaded: bool
    positions: tuple[int, ...]  # of every row
    notes: tuple[ChunkNotes | None, ...] = ()  # per chunk, where variants are loaded
    names: tuple[bytes, ...] = ()  # per chunk, a digest of its tokens: what notes call it
    sensitivities: tuple[tuple[float, ...], ...] = ()  # per chunk and token, where it is stored

    @cached_property
    def reusable(self) -> Tensor:
        """Rows of chunks whose KV is loaded. A blender chooses among these, and no others."""
        import torch

        spans = zip(self.prompt.spans, self.loaded, strict=True)
        rows = [torch.arange(a, b) for (a, b), here in spans if here]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    @cached_property
    def chunk_of(self) -> Tensor:
        """Number of the chunk of every row in ``reusable``, int64."""
        import torch

        ends = torch.tensor([end for _, end in self.prompt.spans])
        return torch.searchsorted(ends, self.reusable, right=True)

    @cached_property
    def place_in_chunk(self) -> Tensor:
        """Place of every row in ``reusable`` within its chunk, from 0, int64."""
        import torch

        starts = torch.tensor([start for start, _ in self.prompt.spans], dtype=torch.int64)
        return self.reusable - starts[self.chunk_of]

    @cached_property
    def sensitivity(self) -> Tensor:
        """Of every row in ``reusable``, float32, finite.

        Rows of a chunk that is stored without it have the mean of those that are known and not 0,
        or 1: they are neither spared nor preferred, and come before rows that stand exactly as
        they were computed.
        """
        import torch

        stored = self.sensitivities or ((),) * len(self.loaded)
        here = [known for known, loaded in zip(stored, self.loaded, strict=True) if loaded]
        sizes = [
            len(c) for c, loaded in zip(self.prompt.chunks, self.loaded, strict=True) if loaded
        ]
        moved = torch.tensor([value for known in here for value in known if value])
        usual = float(moved.mean()) if len(moved) else 1.0
        parts = [
            torch.tensor(known) if known else torch.full((size,), usual)
            for known, size in zip(here, sizes, strict=True)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    @property
    def asking(self) -> slice:
        """The question's rows among any that are computed: they come last."""
        return slice(-len(self.prompt.question), None)

    @cached_property
    def fresh(self) -> Tensor:
        """Rows computed at every layer whatever the blender says: question and missing parts."""
        import torch

        every = torch.ones(len(self.prompt), dtype=torch.bool)
        every[self.reusable] = False
        if self.prefix_loaded:
            every[: len(self.prompt.prefix)] = False
        return every.nonzero()[:, 0]


@dataclass(frozen=True)
class Probe:
    """A look before the work: the question runs over the stale KV, as in naive reuse.

    ``see`` is shown the attention of the first ``layers`` layers. The rows that this computes are
    charged.
    """

    layers: int
    see: AttentionRule


class Selector(ABC):
    """Names the reusable rows that are computed, layer by layer. The set only shrinks."""

    @property
    def probe(self) -> Probe | None:
        """Runs before :meth:`first` is asked for."""
        return None

    @property
    def attend(self) -> AttentionRule | None:
        """Sees the attention of every layer of the fusion, and may take its place."""
        return None

    @property
    def lasting(self) -> bool:
        """Whether :attr:`attend` goes on while the answer is decoded."""
        return False

    @abstractmethod
    def first(self) -> Tensor:
        """Reusable rows computed at layer 0; sorted int64."""

    def loads(self, layer: int) -> bool:
        """Whether stored KV of this layer is needed. False only for first layers, in which all rows
        are computed and nothing is compared."""
        return True

    def narrows(self, layer: int) -> bool:
        """Whether :meth:`narrow` is to be called at this layer."""
        return False

    def compares(self, layer: int) -> bool:
        """Whether it then needs the rows' KV."""
        return False

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        """Rows to go on with: a sorted subset of ``rows``.

        Without :attr:`attend`, only they take part in the rest of the layer, behind its fresh KV.
        With it, the layer is over and its attention was seen. ``fresh`` and ``stored``, where the
        layer ``compares``, are keys (after RoPE) and values of ``rows`` as computed now and as
        loaded, each (kv_heads, len(rows), head_dim).
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedRows(Selector):
    """The same rows at every layer."""

    rows: Tensor

    def first(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class Blender(ABC):
    """A fusion method. Fields are its paper's parameters, with the paper's defaults."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise ConfigError for a parameter that is no number where its default is one."""
        for field in fields(self):
            check_number(getattr(self, field.name), field.name, field.default)

    @abstractmethod
    def selector(self, layout: Layout, layers: int) -> Selector:
        """Choose rows for one prompt of a model of ``layers`` layers.

        Raises ConfigError, before any work, if the method cannot be used with this model.
        """

    @property
    def mode(self) -> str:
        """What a Report calls this method."""
        return self.name

    @property
    def behind(self) -> Behind:
        """What the KV that this method loads must have been computed behind."""
        return "compiled"

    @property
    def by_sensitivity(self) -> bool:
        """Whether it ranks rows by the sensitivity that is stored with their chunks."""
        return False

    def overhead(self, notes: ChunkNotes, before: Sequence[bytes]) -> float | None:
        """Share of a variant's rows that this method would compute where its chunk stands behind
        the chunks ``before``; None where the chunk is better computed as a whole."""
        raise NotImplementedError(f"{self.name} loads no variants")

    @property
    def placement(self) -> Positions:
        """``overlapping``: every chunk starts right after the prefix, the question behind the
        longest of them. Such a prompt needs the KV of all its chunks."""
        return "consecutive"

    @property
    def parameters(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_number(value: Any, name: str, like: Any) -> None:
    """Raise ConfigError where ``like`` is a number and ``value`` is none of its kind that 64 bits
    hold: a float may be given as an integer, nothing else as another."""
    if isinstance(like, bool):
        fits = isinstance(value, bool)
    elif isinstance(like, (int, float)):
        fits = isinstance(value, (int, type(like))) and not isinstance(value, bool)
    else:
        return
    if not fits:
        raise ConfigError(f"{name} is {value!r}: give a {type(like).__name__} such as {like}")
    if not -(1 << 63) <= value < 1 << 63:  # NaN is not
        shown = value if isinstance(value, float) else "beyond 64 bits"
        raise ConfigError(f"{name} is {shown}: give a number that 64 bits hold, such as {like}")


def check_ratio(ratio: float, name: str = "recompute_ratio") -> None:
    """Raise ConfigError unless ``ratio`` is in [0, 1]."""
    if not (isinstance(ratio, (int, float)) and 0 <= ratio <= 1):
        raise ConfigError(f"{name} is {ratio}: it is the share of chunk tokens, from 0 to 1")


def check_least(value: float, name: str, least: int = 0) -> None:
    """Raise ConfigError unless ``value`` is ``least`` or more."""
    if not value >= least:
        raise ConfigError(f"{name} is {value}: it must be {least} or more")


def check_depth(method: str, check_layer: int, layers: int) -> None:
    """Raise ConfigError where a model has no layer behind the one that a method looks at."""
    if layers < check_layer + 2:
        raise ConfigError(
            f"{method} checks layer {check_layer} and needs a layer behind it, but the model has "
            f"{layers}. Use a lower check_layer, or mode reuse or full."
        )


def positions(prompt: Prompt, placement: Positions) -> tuple[int, ...]:
    """The position of every row of ``prompt`` (see :attr:`Blender.placement`)."""
    if placement == "consecutive":
        return tuple(range(len(prompt)))
    start = len(prompt.prefix)
    end = start + max(map(len, prompt.chunks), default=0)
    chunks = (range(start, start + len(chunk)) for chunk in prompt.chunks)
    rows = [*range(start), *(p for chunk in chunks for p in chunk)]
    return (*rows, *range(end, end + len(prompt.question)))
