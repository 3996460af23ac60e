"""Linear layers and attention in float32 on CPUs on which MKL is slow.

torch multiplies float32 matrices by MKL, which uses half of the vector width on CPUs that are not
Intel's: a Zen 5 core computes 110 GFLOP/s with it, and 250 with oneDNN, which torch also brings,
and uses for 16-bit types (``python -m bench.matmul``). Its attention is made of such products, too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Names of implementations that compute scaled dot-product attention: torch's, and the one here.
SDPA = "sdpa", "sdpa_onednn"

_WORTHWHILE = 1 << 20  # multiply-adds: oneDNN takes 10 us for the smallest product
_ROWS = 128  # query rows at a time, less where their scores would not stay in the CPU's cache
_SCORES = 3 << 18  # their number
#: Arguments of attention that are more than scaled, masked softmax, where they are given.
_EXTRAS = "softcap", "s_aux", "position_bias", "output_attentions", "cache"


def use_onednn(model: Any) -> bool:
    """Let a float32 model of transformers on a CPU compute with oneDNN, where that is faster;
    whether it does. Its weights stay where and what they are."""
    if not is_faster() or model.dtype != torch.float32 or model.device.type != "cpu":
        return False
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.is_contiguous():
            module.__class__ = _OneDNNLinear
    config = model.get_decoder().config
    if config._attn_implementation == SDPA[0]:
        AttentionInterface.register(SDPA[1], _attention)
        AttentionMaskInterface.register(SDPA[1], sdpa_mask)
        config._attn_implementation = SDPA[1]
    return True


@cache
def is_faster() -> bool:
    """Whether float32 products on this CPU are faster with oneDNN than with what torch uses."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    built = torch._C.has_mkl and torch._C._has_mkldnn
    return wide and built and _vendor() not in ("", "GenuineIntel")


def _vendor() -> str:
    """The maker of the CPU as Linux names it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if "vendor_id" in line), "")


def product(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows`` (..., k) times the transpose of ``columns`` (n, k), float32 on a CPU.

    ``columns`` is contiguous, or its transpose is.
    """
    made: Tensor = torch.ops.mkldnn._linear_pointwise(rows, columns, bias, "none", [], "")
    return made


class _OneDNNLinear(nn.Linear):
    """A linear layer that computes with oneDNN, but for small products and for gradients."""

    def forward(self, input: Tensor) -> Tensor:
        small = input.numel() * self.out_features < _WORTHWHILE
        if small or input.dtype != torch.float32 or torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)


def attend_into(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> None:
    """Write the attention of ``query`` (heads, rows, d) over ``key`` and ``value`` (kv_heads, keys,
    d) into ``out`` (rows, heads, d).

    ``mask`` (rows, n) is added to the scores of the last ``n`` keys.
    """
    share, rows, dim = len(query) // len(key), query.shape[1], query.shape[2]
    keys, hidden = key.shape[1], mask.shape[1]
    blind = mask.isneginf().all(-1) if hidden == keys else None  # rows that see no key
    for head in range(len(key)):
        group = slice(head * share, head * share + share)
        # Strided keys and values would take a hundred times as long.
        scores = product(query[group].reshape(-1, dim) * scale, key[head].contiguous())
        scores = scores.view(share, rows, keys)
        scores[:, :, keys - hidden :] += mask
        torch.softmax(scores, -1, out=scores)
        if blind is not None:
            scores[:, blind] = 0  # as in torch
        got = product(scores.view(share * rows, keys), value[head].contiguous().T)
        out[:, group] = got.view(share, rows, -1).transpose(0, 1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function ``SDPA[1]`` of transformers: (batch, heads, n, d) in, (batch, n,
    heads, d) out. What it is not made for is computed by transformers' own ``sdpa``."""
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        known = causal and rows == keys
    else:
        known = attention_mask.shape[:2] == (1, 1)
    extras = [one for name in _EXTRAS if (one := kwargs.get(name)) is not None and one is not False]
    large = query.dtype == torch.float32 and batch == 1 and rows > 1
    large = large and rows * keys * heads * dim >= _WORTHWHILE
    if not (known and large) or dropout or extras or torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    scale = dim**-0.5 if scaling is None else scaling
    most = group_rows(heads // kv_heads, keys)
    out = query.new_empty(1, rows, heads, value.shape[3])
    later = query.new_full((most, most), float("-inf")).triu_(1)
    for start in range(0, rows, most):
        stop = min(start + most, rows)
        if attention_mask is None:
            seen, mask = stop, later[: stop - start, : stop - start]
        else:
            seen, mask = keys, added(attention_mask[0, 0, start:stop, :keys], query.dtype)
        span = slice(start, stop)
        attend_into(
            out[0, span], query[0, :, span], key[0, :, :seen], value[0, :, :seen], mask, scale
        )
    return out, None


def group_rows(share: int, keys: int) -> int:
    """How many rows to compute at a time, of ``share`` heads together."""
    rows = _ROWS
    while rows > 16 and rows * share * keys > _SCORES:
        rows //= 2
    return rows


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores, of a bool one (True: seen) or one that is added already."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
