"""Choose, at load, the kernels with which an engine on a GPU places stored KV and attends.

The reference is torch's own operations, which run on every device. A Triton kernel is used if its
results agree with the reference's and it takes less time. On a CPU there is no choice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ragcache.engine.hf.rope import Rope
from ragcache.engine.kernels.row_attention import RowAttention, TritonRowAttention, without_cudnn
from ragcache.errors import ConfigError, ModelError
from ragcache.types import KVPair

logger = logging.getLogger(__name__)

#: Parts, cos and sin (None: keys are not rotated), and the destination: see triton_place.place.
Place = Callable[[Sequence[KVPair], "KVPair | None", KVPair], None]

Trial = Callable[[], Tensor]  # runs a kernel: it is timed, and its result compared

_KERNELS = "auto", "torch", "triton"
#: Largest accepted error of a vector, relative to its norm.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_PARTS, _TOKENS, _SHARE = 8, 512, 0.15  # chunks, their tokens, share of rows that attend
_RUNS = 5
_ATTENTION: dict[str, type[RowAttention]] = {"triton": TritonRowAttention}


@dataclass(frozen=True)
class Kernels:
    """The chosen kernels. None: torch's operations; the model's own attention, with a mask."""

    place: Place | None = None
    attention: type[RowAttention] | None = None
    about: str = "torch"  # the choice and the measured times, for display

    @property
    def names(self) -> str:
        """The names of both kernels, equal in all processes with the same choice."""
        placing = "torch" if self.place is None else "triton"
        return f"{placing}, {'torch' if self.attention is None else self.attention.__name__}"


@dataclass(frozen=True)
class AttentionShape:
    """Heads, head dimension, dtype and device of a model's attention."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(
            *shape, self.dim, generator=generator, dtype=self.dtype, device=self.device
        )


def choose(wanted: str, shape: AttentionShape, rope: Rope) -> Kernels:
    """The kernels for a model of this ``shape``.

    ``wanted``: one of ``_KERNELS``; auto takes the faster one. Raises ConfigError if it is unknown
    or needs CUDA, and ModelError if a kernel that is named gives wrong results.
    """
    if wanted not in _KERNELS:
        raise ConfigError(f"kernels {wanted!r} are unknown: use {', '.join(_KERNELS)}")
    if shape.device.type != "cuda":
        if wanted in _ATTENTION:
            raise ConfigError(
                f"kernels {wanted} were asked for, but they need CUDA and the model is on "
                f"{shape.device}: use auto"
            )
        return Kernels(about="torch, on a CPU")
    if wanted == "torch":
        return Kernels()
    return _measure_kernels(wanted, shape, rope)


def _measure_kernels(wanted: str, shape: AttentionShape, rope: Rope) -> Kernels:
    """Compare the ``wanted`` kernels with the reference on a typical prompt."""
    name = "triton" if wanted == "auto" else wanted
    attending = {
        "torch": attention_trials(None, shape, _PARTS * _TOKENS, _SHARE),
        name: attention_trials(_ATTENTION[name], shape, _PARTS * _TOKENS, _SHARE),
    }
    placing = {"torch": [placing_trial(partial(place_by_torch, rope), shape)]}
    if rope.halves and name == "triton":
        placing[name] = [placing_trial(place_by_triton, shape)]
    attends, about_attention = _fastest("attention", attending, shape.dtype, wanted)
    places, about_placing = _fastest("placing", placing, shape.dtype, wanted)
    return Kernels(
        place_by_triton if places == "triton" else None,
        _ATTENTION.get(attends),
        f"{about_attention}; {about_placing}",
    )


def place_by_torch(
    rope: Rope | None, parts: Sequence[KVPair], angles: KVPair | None, out: KVPair
) -> None:
    """The reference of ``triton_place.place``, on any device; same arguments."""
    keys, values = zip(*parts, strict=True)
    torch.cat(values, 1, out=out[1])
    if keys[0].dtype == out[0].dtype:
        joined = torch.cat(keys, 1, out=out[0])
    else:
        joined = torch.cat(keys, 1)
    if rope is not None and angles is not None:
        rope.rotate_into(joined, *angles, out[0])
    elif joined is not out[0]:
        out[0].copy_(joined)


def place_by_triton(parts: Sequence[KVPair], angles: KVPair | None, out: KVPair) -> None:
    from ragcache.engine.kernels.triton_place import place

    place(parts, angles, out)


def placing_trial(place: Place, shape: AttentionShape) -> Trial:
    """A trial that places random KV; its result is the destination, (2, kv_heads, rows, d)."""
    rows = _PARTS * _TOKENS
    stored = shape.random(_PARTS, 2, shape.kv_heads, _TOKENS)
    parts = [(keys, values) for keys, values in stored]
    turned = shape.random(rows).float()
    angles = turned.cos().to(shape.dtype), turned.sin().to(shape.dtype)
    out = stored.new_zeros(2, shape.kv_heads, rows, shape.dim)

    def work() -> Tensor:
        place(parts, angles, (out[0], out[1]))
        return out

    return work


def attention_trials(
    kind: type[RowAttention] | None, shape: AttentionShape, tokens: int, share: float
) -> list[Trial]:
    """A trial for each variant of ``kind``; None: SDPA with a mask, as transformers calls it.

    A ``share`` of the rows of a random prompt of ``tokens`` attend, the first and the last among
    them; the result is (1, rows, heads, d).
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(tokens, generator=generator)[: max(2, int(share * tokens))]
    rows = rows.sort().values.to(shape.device)
    rows[0], rows[-1] = 0, tokens - 1
    query = shape.random(1, len(rows), shape.heads).transpose(1, 2)
    key, value = shape.random(2, 1, shape.kv_heads, tokens)
    given = {"query": query, "key": key, "value": value, "scale": shape.dim**-0.5}
    if kind is not None:
        return [partial(attend, **given) for attend in kind(rows).variants()]
    mask = (torch.arange(tokens, device=shape.device) <= rows[:, None])[None, None]
    return [partial(_masked, **given, mask=mask)]


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    with without_cudnn():
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error of any vector (last dimension), relative to the norm of ``want``'s."""
    off = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-12)
    return float(off.max())


def _fastest(
    what: str, works: Mapping[str, Sequence[Trial]], dtype: torch.dtype, wanted: str
) -> tuple[str, str]:
    """The name of the fastest kernel, or the ``wanted`` one, and a line about it for display.

    The first of ``works`` is the reference. A kernel that fails, or whose result differs in any
    variant, is not used. Raises ModelError if that kernel was wanted by name.
    """
    reference, *others = works
    want = works[reference][0]().clone()
    seconds = {reference: _seconds(works[reference][0])}
    for name in others:
        try:
            off = max(relative_error(work(), want) for work in works[name])
            wrong = "" if off <= TOLERANCE[dtype] else f"is off by {off:.1e}"
            seconds |= {} if wrong else {name: _seconds(works[name][0])}
        except Exception as failure:  # compilers and drivers raise anything
            wrong = f"fails ({type(failure).__name__}: {failure})"
        if wrong and wanted == name:
            raise ModelError(f"kernels {name} were asked for, but {what} {wrong}: use auto")
        if wrong:
            logger.warning("%s by %s %s: it is not used", what, name, wrong)
    best = wanted if wanted in seconds else min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in seconds.items())
    return best, f"{what} by {best} ({times})"


def _seconds(work: Trial) -> float:
    """The shortest of several runs."""
    taken = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        out = work()
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        taken.append(time.perf_counter() - began)
    return min(taken)
