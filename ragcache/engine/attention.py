"""What a model's attention is about to compute, and a way to watch it or to take its place.

transformers dispatches attention by name. While a forward is driven, the models' configuration
names the function below, which shows each layer's call to a rule and then, unless the rule has
answered it, hands it on to the implementation that the model uses otherwise: on a CPU a few rows
at a time, so that the keys behind them are left out (see groups.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ragcache.engine.base import AttentionCall, AttentionRule
from ragcache.engine.groups import Groups

_NAME = "ragcache_driven"


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


class Dispatch:
    """The attention of one forward: the rule, if there is one, and the rows computed just now."""

    def __init__(self, rule: AttentionRule | None, config: Any, start: int = 0) -> None:
        self.rule, self.config = rule, config
        self.start = start  # first row of the forward
        self.implementation: str = config._attn_implementation
        self.layer, self.rows = 0, torch.empty(0, dtype=torch.int64)
        self.groups: Groups | None = None

    def at(self, layer: int, rows: Tensor, *, cut: bool) -> None:
        """Say what is computed next; from here on the model's attention comes here.

        ``cut``: some rows are left out. Masks were made before this, by the model's own
        implementation.
        """
        if not cut or rows.device.type != "cpu":
            self.groups = None
        elif self.groups is None or len(rows) != len(self.groups.rows):  # a subset: the same rows
            self.groups = Groups(rows)
        self.layer, self.rows = layer, rows + self.start
        ours = self.rule is not None or self.groups is not None
        self.config._attn_implementation = _NAME if ours else self.implementation

    @contextmanager
    def installed(self) -> Iterator[None]:
        AttentionInterface.register(_NAME, _driven)
        token = _DISPATCH.set(self)
        try:
            yield
        finally:
            _DISPATCH.reset(token)
            self.config._attn_implementation = self.implementation


_DISPATCH: ContextVar[Dispatch] = ContextVar("dispatch")


def _driven(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (batch, heads, n, d) in, (batch, n, heads, d) out."""
    dispatch = _DISPATCH.get()
    if dispatch.rule is not None:
        answer = dispatch.rule(_call(dispatch, module, query, key, value, attention_mask, kwargs))
        if answer is not None:
            return answer.transpose(0, 1)[None].contiguous(), None
    if dispatch.groups is not None and dispatch.implementation == "sdpa":
        assert attention_mask is not None, "rows that are cut have a mask"
        return dispatch.groups.sdpa(query, key, value, attention_mask, kwargs.get("scaling")), None
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(dispatch.implementation, cast(Any, eager))
    return cast(
        "tuple[Tensor, Tensor | None]",
        attend(module, query, key, value, attention_mask, **kwargs),
    )


def _call(
    dispatch: Dispatch,
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
        layer=dispatch.layer,
        rows=dispatch.rows,
        queries=query[0],
        keys=key[0],
        values=value[0],
        mask=None if mask is None else mask[0, 0, :, : key.shape[2]],
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=kwargs.get("softcap"),
        sinks=getattr(module, "sinks", None) if sinks is None else sinks,
    )
