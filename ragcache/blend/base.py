"""The contract of a blender: which KV to load, where to place it, which rows to recompute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ragcache.errors import ConfigError
from ragcache.types import ChunkNotes, KVPair, LayerLoad, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.engine.base import AttentionRule, Repair

__all__ = [
    "Blender",
    "FixedRows",
    "KVSource",
    "Layout",
    "ReusedKV",
    "Selector",
    "check_least",
    "check_ratio",
    "positions",
]

#: Which stored KV of a chunk a method reuses:
#:
#: - ``encoded``: computed when the chunk was precomputed, in the store's encoding context (by
#:   default the prompt's prefix);
#: - ``in_context``: computed after exactly the tokens that precede the chunk in this prompt;
#: - ``variant``: cut from an earlier prompt, computed after the chunks that preceded it there;
#: - ``nothing``: no stored KV is used.
ReusedKV = Literal["encoded", "in_context", "variant", "nothing"]
Positions = Literal["consecutive", "overlapping"]

#: Tokens of the question, the last ones, that a probe computes: it costs as much as these rows.
PROBE_TOKENS = 128


class KVSource(Protocol):
    """The stored KV of a prompt's loaded parts, read layer by layer, in order, once each.

    A part may have more rows than in the prompt: the first ones are used.
    """

    def start(self, layers: Sequence[int]) -> None:
        """Begin to load. Only these layers will be read, in ascending order."""

    def layer(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Per loaded part, keys before RoPE and values, each (kv_heads, n, head_dim).

        The tensors must not be modified.
        """

    def load(self, layer: int) -> LayerLoad:
        """Bytes and times of a layer that was read."""


@dataclass(frozen=True)
class Layout:
    """A prompt and what is known about its parts. Row sets are sorted int64 tensors on the CPU."""

    prompt: Prompt
    loaded: tuple[bool, ...]  # per chunk: is its KV loaded?
    texts_loaded: int  # first texts of the prompt whose KV, computed in this context, is loaded
    positions: tuple[int, ...]  # RoPE position of every row
    notes: tuple[ChunkNotes | None, ...] = ()  # per chunk, where variants are loaded
    names: tuple[bytes, ...] = ()  # per chunk, the digest of its tokens, which notes refer to
    sensitivities: tuple[tuple[float, ...], ...] = ()  # per chunk and token; () if not stored
    kept: int = 0  # first rows whose KV is that of an earlier prompt: no loaded part is among them
    #: Per chunk, whether its KV was computed after exactly the tokens that precede it here, so that
    #: it is that of full prefill; (): of none.
    exact: tuple[bool, ...] = ()
    repairs: bool = True  # whether rows can be computed while the answer is decoded

    @cached_property
    def loaded_spans(self) -> tuple[tuple[int, int], ...]:
        """The rows of every loaded part, in prompt order."""
        chunks = zip(self.prompt.spans, self.loaded, strict=True)
        texts = self.prompt.text_spans[: self.texts_loaded]
        return tuple(sorted((*texts, *(span for span, here in chunks if here))))

    @cached_property
    def loaded_text_rows(self) -> Tensor:
        """Rows of texts whose KV is loaded, which are exact."""
        import torch

        rows = [torch.arange(a, b) for a, b in self.prompt.text_spans[: self.texts_loaded]]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    @property
    def kept_chunk_rows(self) -> int:
        """The number of kept rows that are of chunks."""
        return sum(min(stop, self.kept) - start for start, stop in self._kept_chunks)

    @property
    def after_kept_rows(self) -> int:
        """The number of computed rows of a chunk whose first rows are kept."""
        return sum(max(0, stop - self.kept) for _, stop in self._kept_chunks)

    @property
    def _kept_chunks(self) -> Iterator[tuple[int, int]]:
        return ((start, stop) for start, stop in self.prompt.spans if start < self.kept)

    @cached_property
    def reusable(self) -> Tensor:
        """Rows of chunks whose KV is loaded: those that a blender may choose to recompute."""
        import torch

        spans = zip(self.prompt.spans, self.loaded, strict=True)
        rows = [torch.arange(a, b) for (a, b), here in spans if here]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    @cached_property
    def chunk_of(self) -> Tensor:
        """The chunk number of every row in ``reusable``, int64."""
        import torch

        ends = torch.tensor([end for _, end in self.prompt.spans])
        return torch.searchsorted(ends, self.reusable, right=True)

    @cached_property
    def place_in_chunk(self) -> Tensor:
        """The index of every row in ``reusable`` within its chunk, from 0, int64."""
        import torch

        starts = torch.tensor([start for start, _ in self.prompt.spans], dtype=torch.int64)
        return self.reusable - starts[self.chunk_of]

    @cached_property
    def moved(self) -> Tensor:
        """Whether each row in ``reusable`` is of a chunk that is not :attr:`exact`, bool."""
        import torch

        exact = self.exact or (False,) * len(self.loaded)
        return ~torch.tensor(exact, dtype=torch.bool)[self.chunk_of]

    @cached_property
    def sensitivity(self) -> Tensor:
        """The sensitivity of every row in ``reusable``, float32, finite.

        Rows of a chunk that is stored without sensitivities get the mean of the known ones above 0,
        or 1 if there are none: they rank as average, and above rows whose stored KV is exact.
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
        """The question's rows among the computed ones: always the last."""
        return slice(-len(self.prompt.question), None)

    @cached_property
    def probed(self) -> Tensor:
        """The rows of a probe: those of chunks that are loaded or kept, all before the first chunk,
        and the question's last :data:`PROBE_TOKENS`. So what a probe sees does not depend on which
        texts are stored; missing chunks and texts between chunks would cost too much."""
        import torch

        here = torch.zeros(len(self.prompt), dtype=torch.bool)
        here[: max(self.kept, self.prompt.spans[0][0] if self.prompt.spans else 0)] = True
        here[self.reusable] = True
        here[-self.asked :] = True
        return here.nonzero()[:, 0]

    @cached_property
    def probing(self) -> Tensor:
        """The rows that a probe computes: those of :attr:`probed` that are neither loaded nor kept.
        The question's, the last :attr:`asked`, are among them."""
        import torch

        return self.probed[torch.isin(self.probed, self.fresh)]

    def in_probe(self, rows: Tensor) -> Tensor:
        """The places of ``rows``, a subset of :attr:`probed`, among these."""
        import torch

        return torch.searchsorted(self.probed, rows)

    @property
    def asked(self) -> int:
        """The number of the question's rows that a probe computes."""
        return min(PROBE_TOKENS, len(self.prompt.question))

    @property
    def ending(self) -> int:
        """The number of rows after the last chunk, at most :data:`PROBE_TOKENS`."""
        after = max((stop for _, stop in self.prompt.spans), default=0)
        return min(PROBE_TOKENS, len(self.prompt) - after)

    @cached_property
    def fresh(self) -> Tensor:
        """Rows that every blender computes at every layer: those neither loaded nor kept."""
        import torch

        every = torch.ones(len(self.prompt), dtype=torch.bool)
        every[self.reusable] = False
        every[self.loaded_text_rows] = False
        every[: self.kept] = False
        return every.nonzero()[:, 0]


@dataclass(frozen=True)
class Probe:
    """A forward pass before the fused prefill, in which the question attends to the stored KV, as
    in naive reuse.

    It stops after ``layers`` layers, and ``see`` is called with the attention of each: the queries
    are of :attr:`Layout.probing`, the keys of :attr:`Layout.probed`. The rows that it computes
    count towards the charged budget.
    """

    layers: int
    see: AttentionRule


class Selector(ABC):
    """Chooses the reusable rows to compute, layer by layer. The set may only shrink."""

    @property
    def probe(self) -> Probe | None:
        """A probe to run before :meth:`first` is called; None: no probe."""
        return None

    @property
    def attend(self) -> AttentionRule | None:
        """Called with the attention of every layer of the fused prefill; it may return an output
        that replaces the model's. None: the model's own attention is used."""
        return None

    @property
    def lasting(self) -> bool:
        """Whether :attr:`attend` also applies while the answer is decoded."""
        return False

    @property
    def repair(self) -> Repair | None:
        """Chooses rows to compute after the prefill, and while the answer is decoded; for a
        selector without :attr:`attend`. None: no rows are."""
        return None

    @abstractmethod
    def first(self) -> Tensor:
        """Reusable rows computed at layer 0; sorted int64."""

    def loads(self, layer: int) -> bool:
        """Whether this layer's stored KV is needed. False is allowed for first layers only, in
        which all rows are computed and nothing is compared."""
        return True

    def narrows(self, layer: int) -> bool:
        """Whether :meth:`narrow` is called at this layer."""
        return False

    def compares(self, layer: int) -> bool:
        """Whether :meth:`narrow` needs the fresh and the stored KV of the rows at this layer."""
        return False

    def narrow(
        self, layer: int, rows: Tensor, fresh: KVPair | None, stored: KVPair | None
    ) -> Tensor:
        """The rows to continue with: a sorted subset of ``rows``.

        Without :attr:`attend`, this is called as soon as the layer's keys and values are computed,
        and the rest of the layer runs for the returned rows only. With it, this is called after the
        layer, when its attention is known. ``fresh`` and ``stored`` are the keys (after RoPE) and
        values of ``rows`` as computed now and as loaded, each (kv_heads, len(rows), head_dim), if
        the layer ``compares``, else None.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedRows(Selector):
    """Computes the same rows at every layer."""

    rows: Tensor

    def first(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class Blender(ABC):
    """A fusion method. Its fields are the paper's parameters, with the paper's defaults."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise ConfigError for a parameter that is not a number although its default is one."""
        for field in fields(self):
            check_number(getattr(self, field.name), field.name, field.default)

    @abstractmethod
    def selector(self, layout: Layout, layers: int) -> Selector:
        """Choose rows for one prompt of a model of ``layers`` layers.

        Raises ConfigError if the method cannot be used with this model.
        """

    @property
    def mode(self) -> str:
        """The name of this method in reports."""
        return self.name

    @property
    def revision(self) -> int:
        """Raised when the method, with the same parameters, computes other rows or attends
        otherwise than before. What was measured with an earlier one does not hold for it."""
        return 1

    @property
    def reuses(self) -> ReusedKV:
        """Which stored KV of a chunk this method loads."""
        return "encoded"

    @property
    def by_sensitivity(self) -> bool:
        """Whether this method ranks rows by the sensitivities that are stored with chunks."""
        return False

    def overhead(
        self, notes: ChunkNotes, before: Sequence[bytes], exact: bool = False
    ) -> float | None:
        """Share of a variant's rows that this method would recompute if its chunk follows the
        chunks ``before`` (digests of their tokens); None if the whole chunk should be computed
        instead. ``exact``: see :attr:`Layout.exact`. Only methods that reuse variants implement
        this."""
        raise NotImplementedError(f"{self.name} loads no variants")

    @property
    def placement(self) -> Positions:
        """Where chunks are placed: one after another (``consecutive``), or all chunks without text
        between them at one position (``overlapping``), with the next text after the longest of
        them. An overlapping prompt needs the stored KV of all its chunks."""
        return "consecutive"

    @property
    def keeps_rows(self) -> bool:
        """Whether the first rows of a prompt may be kept from an earlier one: the method needs
        neither the attention nor the computed KV of these rows, and its attention is the model's
        own."""
        return False

    @property
    def without_attention(self) -> Blender:
        """The method to use where attention weights are not shown: this one, if it needs none or
        cannot do without."""
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """Fields and their values, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def ratio(self) -> float | None:
        """Share of the reusable rows to compute, in [0, 1]; None where the method takes none."""
        return None

    @property
    def full_layers(self) -> int:
        """First layers that compute every row, whatever the ratio."""
        return 0


@dataclass(frozen=True)
class RatioBlender(Blender):
    """A method that computes a share of the reusable rows, which a user or the controller sets."""

    recompute_ratio: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.recompute_ratio)

    @property
    def ratio(self) -> float | None:
        return self.recompute_ratio


def check_number(value: Any, name: str, like: Any) -> None:
    """Raise ConfigError if ``like`` is a number and ``value`` is not one of its type that fits 64
    bits. An integer is accepted for a float."""
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
    """Raise ConfigError if ``value`` is less than ``least``."""
    if not value >= least:
        raise ConfigError(f"{name} is {value}: it must be {least} or more")


def check_depth(method: str, check_layer: int, layers: int) -> None:
    """Raise ConfigError if a model has no layer after ``check_layer``."""
    if layers < check_layer + 2:
        raise ConfigError(
            f"{method} checks layer {check_layer} and needs a layer after it, but the model has "
            f"{layers}. Use a lower check_layer, or mode reuse or full."
        )


def positions(prompt: Prompt, placement: Positions) -> tuple[int, ...]:
    """The position of every row of ``prompt`` (see :attr:`Blender.placement`)."""
    if placement == "consecutive":
        return tuple(range(len(prompt)))
    rows: list[int] = []
    start = 0
    for chunks, parts in groupby(prompt.parts, lambda part: part.is_chunk):
        lengths = [len(part.tokens) for part in parts]
        if chunks:
            rows += (start + at for length in lengths for at in range(length))
            start += max(lengths)
        else:
            rows += range(start, start + sum(lengths))
            start += sum(lengths)
    return tuple(rows)
