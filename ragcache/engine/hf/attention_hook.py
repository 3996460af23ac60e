"""What a model's attention is about to compute, and a way to watch it or to take its place.

transformers dispatches attention by name. For the length of a detour the model's configuration
names the function below, which brings each layer's call to the detour. A driven forward is one: it
shows the call to a rule, if there is one, and then, unless the rule has answered it, hands it on to
the implementation that the model uses otherwise; rows that are cut go by groups.py on a CPU, and by
what kernels.py has chosen on a GPU.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ragcache.engine.base import AttentionCall, AttentionRule
from ragcache.engine.hf.grouped_attention import Groups
from ragcache.engine.kernels.row_attention import RowAttention, without_cudnn

_NAME = "ragcache_detour"

#: What an attention function of transformers returns: (batch, n, heads, d), and weights or None.
Attended = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Call(AttentionCall):
    """An AttentionCall with its queries, keys, values and mask at hand."""

    mask: Tensor | None  # (n, keys), bool or added to the scores; None: causal over all keys
    scale: float
    softcap: float | None
    sinks: Tensor | None  # (heads,): a score that takes weight and gives no value

    def scores(self, queries: slice = slice(None)) -> Tensor:
        asked = self.queries[:, queries].float()
        groups = len(self.queries) // len(self.keys)
        keys = self.keys.float().repeat_interleave(groups, 0)
        scores = asked @ keys.transpose(1, 2) * self.scale
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
        groups = len(self.queries) // len(self.keys)
        out = weights @ self.values.float().repeat_interleave(groups, 0)
        return out.to(self.queries.dtype)

    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        every = torch.arange(self.keys.shape[1], device=self.rows.device)
        return every[None] <= self.rows[:, None]


class AttentionOverride(ABC):
    """A forward during which every layer's attention comes here instead of to the model's own."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.implementation: str = config._attn_implementation

    def at(self, layer: int, rows: Tensor, *, cut: bool) -> None:
        """Say which rows of the forward are computed next; from here on attention comes here.

        ``cut``: some are left out. Masks were made before this, by the model's own implementation.
        """
        self.config._attn_implementation = _NAME

    @contextmanager
    def taken(self) -> Iterator[None]:
        AttentionInterface.register(_NAME, _detoured)
        token = _DETOUR.set(self)
        try:
            yield
        finally:
            _DETOUR.reset(token)
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
    ) -> Attended:
        """transformers' attention interface: (batch, heads, n, d) in, (batch, n, heads, d) out."""

    def own(self, module: nn.Module) -> Callable[..., Attended]:
        """What the model computes the attention of ``module`` with otherwise."""
        eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, cast(Any, eager))
        return cast("Callable[..., Attended]", attend)


_DETOUR: ContextVar[AttentionOverride] = ContextVar("detour")


def _detoured(module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
    return _DETOUR.get().attend(module, *args, **kwargs)


def _special(kwargs: dict[str, Any]) -> bool:
    """Whether attention is more than softmax, scale and mask."""
    more = "softcap", "s_aux", "position_bias"
    return bool(kwargs.get("dropout")) or any(kwargs.get(name) is not None for name in more)


class Driven(AttentionOverride):
    """One forward whose rows a driver names: the rule that watches it, if there is one."""

    def __init__(
        self,
        rule: AttentionRule | None,
        config: Any,
        start: int = 0,
        selected: type[RowAttention] | None = None,
    ) -> None:
        super().__init__(config)
        self.selected = selected  # for rows that are cut, on a GPU
        self.rule = rule
        self.start = start  # first row of the forward
        self.layer, self.rows = 0, torch.empty(0, dtype=torch.int64)
        self.cut: Groups | RowAttention | None = None  # how rows that are cut attend

    def at(self, layer: int, rows: Tensor, *, cut: bool) -> None:
        make = self.selected or (Groups if rows.device.type == "cpu" else None)
        if not cut or make is None:
            self.cut = None
        elif self.cut is None or len(rows) != len(self.cut.rows):  # a subset: the same rows
            self.cut = make(rows)
        self.layer, self.rows = layer, rows + self.start
        if self.rule is not None or cut:
            super().at(layer, rows, cut=cut)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Attended:
        if self.rule is not None:
            answer = self.rule(self._call(module, query, key, value, attention_mask, kwargs))
            if answer is not None:
                return answer.transpose(0, 1)[None].contiguous(), None
        if self.cut is not None and self.implementation == "sdpa" and not _special(kwargs):
            assert attention_mask is not None, "rows that are cut have a mask"
            out = self.cut.sdpa(query, key, value, attention_mask, kwargs.get("scaling"))
            if out is not None:
                return out, None
        with without_cudnn() if query.is_cuda else nullcontext():
            return self.own(module)(module, query, key, value, attention_mask, **kwargs)

    def _call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Call:
        scale = kwargs.get("scaling")
        sinks = kwargs.get("s_aux")
        return Call(
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
