"""Replace or observe a model's attention for the duration of one forward.

transformers looks attention functions up by name (``AttentionInterface``). While an
:class:`AttentionOverride` is installed, the model's configuration names :func:`_dispatch`, which
passes every layer's call to it. :class:`PartialForward` passes the call to an
:data:`~ragcache.engine.base.AttentionRule`, if there is one. If the rule does not compute the
output, the model's own implementation does, or, if only some rows are computed,
``grouped_attention`` on a CPU and the kernel that :mod:`ragcache.engine.kernels.choose` has chosen
on a GPU.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ragcache.engine.base import AttentionCall, AttentionRule
from ragcache.engine.hf.grouped_attention import GroupedAttention
from ragcache.engine.hf.onednn import SDPA
from ragcache.engine.kernels.row_attention import RowAttention

__all__ = ["EagerAttentionCall"]

_NAME = "ragcache_override"

#: What an attention function of transformers returns: (batch, n, heads, d), and weights or None.
AttentionOutput = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class EagerAttentionCall(AttentionCall):
    """An AttentionCall that computes scores, softmax and output with plain torch operations."""

    mask: Tensor | None  # (n, keys), bool or added to the scores; None: causal
    scale: float
    softcap: float | None
    sinks: Tensor | None  # (heads,): score of each head's attention sink, which has no value

    def scores(self, queries: slice = slice(None)) -> Tensor:
        selected = self.queries[:, queries].float()
        grouped = selected.reshape(len(self.keys), -1, selected.shape[2])  # heads of a KV head
        scores = grouped @ self.keys.float().transpose(1, 2) * self.scale
        scores = scores.view(*selected.shape[:2], -1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = self._mask()[queries]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, float("-inf"))
        return scores + mask.float()

    def softmax(self, scores: Tensor) -> Tensor:
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float()[:, None, None].expand(*scores.shape[:2], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def attend(self, weights: Tensor) -> Tensor:
        heads, rows, keys = weights.shape
        out = weights.reshape(len(self.values), -1, keys) @ self.values.float()
        return out.view(heads, rows, -1).to(self.queries.dtype)

    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        every = torch.arange(self.keys.shape[1], device=self.rows.device)
        return every[None] <= self.rows[:, None]


class AttentionOverride(ABC):
    """Computes the attention of every layer during one forward, instead of the model's own."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.implementation: str = config._attn_implementation

    def begin_layer(self, layer: int, rows: Tensor, *, partial: bool) -> None:
        """Announce ``rows`` (sorted int64), the rows of the forward that ``layer`` computes next.

        From the first call on, this object computes the attention. The model has made its masks by
        then, for its own implementation. ``partial``: some rows of the forward are left out.
        """
        self.config._attn_implementation = _NAME

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context manager in which this object receives the model's attention calls."""
        AttentionInterface.register(_NAME, _dispatch)
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)
            self.config._attn_implementation = self.implementation

    @abstractmethod
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionOutput:
        """transformers' attention interface: (batch, heads, n, d) in, (batch, n, heads, d) out."""

    def model_attention(self, module: nn.Module) -> Callable[..., AttentionOutput]:
        """The attention function that the model itself would use for ``module``."""
        eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, cast(Any, eager))
        return cast("Callable[..., AttentionOutput]", attend)


_ACTIVE: ContextVar[AttentionOverride] = ContextVar("attention_override")


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> AttentionOutput:
    return _ACTIVE.get().attend(module, *args, **kwargs)


def _has_extras(kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for more than scaled, masked softmax attention."""
    more = "softcap", "s_aux", "position_bias"
    return bool(kwargs.get("dropout")) or any(kwargs.get(name) is not None for name in more)


class PartialForward(AttentionOverride):
    """A forward that computes only some rows, or whose attention a rule observes.

    ``start`` is the first row of the forward in the prompt. ``selected`` computes the attention of
    some rows on a GPU; None: the model's own implementation does.
    """

    def __init__(
        self,
        rule: AttentionRule | None,
        config: Any,
        start: int = 0,
        selected: type[RowAttention] | None = None,
    ) -> None:
        super().__init__(config)
        self.selected = selected
        self.rule = rule
        self.start = start
        self.layer, self.rows = 0, torch.empty(0, dtype=torch.int64)
        self.partial: GroupedAttention | RowAttention | None = None  # attention of some rows

    def begin_layer(self, layer: int, rows: Tensor, *, partial: bool) -> None:
        make = self.selected or (GroupedAttention if rows.device.type == "cpu" else None)
        if not partial or make is None:
            self.partial = None
        elif self.partial is None or len(rows) != len(self.partial.rows):
            # rows can only be removed, so an equal number of rows means the same rows
            self.partial = make(rows)
        self.layer, self.rows = layer, rows + self.start
        if self.rule is not None or partial:
            super().begin_layer(layer, rows, partial=partial)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionOutput:
        if self.rule is not None:
            answer = self.rule(self._call(module, query, key, value, attention_mask, kwargs))
            if answer is not None:
                return answer.transpose(0, 1)[None].contiguous(), None
        if self.partial is not None and self.implementation in SDPA and not _has_extras(kwargs):
            assert attention_mask is not None, "a partial forward has a mask"
            out = self.partial.sdpa(query, key, value, attention_mask, kwargs.get("scaling"))
            if out is not None:
                return out, None
        return self.model_attention(module)(module, query, key, value, attention_mask, **kwargs)

    def _call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> EagerAttentionCall:
        scale = kwargs.get("scaling")
        sinks = kwargs.get("s_aux")
        return EagerAttentionCall(
            layer=self.layer,
            rows=self.rows,
            queries=query[0],
            keys=key[0],
            values=value[0],
            mask=None if mask is None else mask[0, 0, :, : key.shape[2]],
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            softcap=kwargs.get("softcap"),
            sinks=getattr(module, "sinks", None) if sinks is None else sinks,
        )
