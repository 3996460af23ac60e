"""What an engine on a GPU places stored KV and attends with: chosen by measurement, once, at load.

The reference is what every device can do: torch's operations. Another kernel is used where its
results agree with that one's and it takes less time. On a CPU nothing is chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ragcache.engine.hf.prompt_cache import KVPair
from ragcache.engine.hf.rope import Rope
from ragcache.engine.kernels.row_attention import (
    Flex,
    RowAttention,
    TritonRowAttention,
    without_cudnn,
)
from ragcache.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

#: Parts, cos and sin (None: keys are left as they are), and where to: see place.py.
Place = Callable[[Sequence[KVPair], "KVPair | None", KVPair], None]

Work = Callable[[], Tensor]  # to be timed, and its result compared

KERNELS = "auto", "torch", "triton", "flex"
#: Largest error accepted of a vector, relative to its norm.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_PARTS, _TOKENS, _SHARE = 8, 512, 0.15  # what is measured: a typical prompt
_RUNS = 5
_ATTENTION: dict[str, type[RowAttention]] = {"triton": TritonRowAttention, "flex": Flex}


@dataclass(frozen=True)
class Kernels:
    """What was chosen. None: torch's operations, and the model's own attention, with a mask."""

    place: Place | None = None
    attention: type[RowAttention] | None = None
    about: str = "torch"  # for people

    @property
    def names(self) -> str:
        """What places and what attends, by name: the same in every process that chose the same."""
        placing = "torch" if self.place is None else "triton"
        return f"{placing}, {'torch' if self.attention is None else self.attention.__name__}"


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention."""

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


def choose(wanted: str, shape: Shape, rope: Rope) -> Kernels:
    """The kernels for models of ``shape``; on a CPU there is no choice.

    ``wanted``: auto, the faster of torch's and ours; or one of ``KERNELS`` by name. FlexAttention
    is used by name only, for compiling it takes longer than loading a model. ConfigError where
    what is wanted is unknown or needs CUDA, ModelError where it does not compute what it should.
    """
    if wanted not in KERNELS:
        raise ConfigError(f"kernels {wanted!r} are unknown: use {', '.join(KERNELS)}")
    if shape.device.type != "cuda":
        if wanted in _ATTENTION:
            raise ConfigError(
                f"kernels {wanted} were asked for, but they need CUDA and the model is on "
                f"{shape.device}: use auto"
            )
        return Kernels(about="torch, on a CPU")
    if wanted == "torch":
        return Kernels()
    return measure_kernels(wanted, shape, rope)


def measure_kernels(wanted: str, shape: Shape, rope: Rope) -> Kernels:
    """Hold what is ``wanted`` against the reference at a typical prompt."""
    name = "triton" if wanted == "auto" else wanted
    attending = {
        "torch": attention(None, shape, _PARTS * _TOKENS, _SHARE),
        name: attention(_ATTENTION[name], shape, _PARTS * _TOKENS, _SHARE),
    }
    placing = {"torch": [placed(partial(by_torch, rope), shape)]}
    if rope.halves and name == "triton":
        placing[name] = [placed(by_triton, shape)]
    attends, told = _fastest("attention", attending, shape.dtype, wanted)
    places, told_too = _fastest("placing", placing, shape.dtype, wanted)
    return Kernels(
        by_triton if places == "triton" else None, _ATTENTION.get(attends), f"{told}; {told_too}"
    )


def by_torch(
    rope: Rope | None, parts: Iterable[KVPair], angles: KVPair | None, out: KVPair
) -> None:
    """What every device can do, and the reference of ``triton_place.place``."""
    turn = None if rope is None or angles is None else rope.rotator(*angles)
    start = 0
    for keys, values in parts:
        span = slice(start, start + keys.shape[1])
        out[1][:, span] = values
        if turn is None:
            out[0][:, span] = keys
        else:
            turn(keys, span, out[0][:, span])
        start += keys.shape[1]


def by_triton(parts: Sequence[KVPair], angles: KVPair | None, out: KVPair) -> None:
    from ragcache.engine.kernels.triton_place import place

    place(parts, angles, out)


def placed(place: Place, shape: Shape) -> Work:
    """A work: parts of random KV placed; its result is all that was."""
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


def attention(
    kind: type[RowAttention] | None, shape: Shape, tokens: int, share: float
) -> list[Work]:
    """A work for each variant of ``kind``: some rows of a random prompt attend, the first and the
    last among them; (1, rows, heads, d). ``kind`` None: SDPA with a mask, as transformers calls
    it."""
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


def error(got: Tensor, want: Tensor) -> float:
    """The largest of any vector, relative to its norm."""
    off = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-12)
    return float(off.max())


def _fastest(
    what: str, works: Mapping[str, Sequence[Work]], dtype: torch.dtype, wanted: str
) -> tuple[str, str]:
    """The name of the fastest, or what is ``wanted``, and a line about it for people.

    The first is the reference: what fails or, in any variant, gives another result is not used.
    """
    reference, *others = works
    want = works[reference][0]().clone()
    seconds = {reference: _seconds(works[reference][0])}
    for name in others:
        try:
            off = max(error(work(), want) for work in works[name])
            wrong = "" if off <= TOLERANCE[dtype] else f"is off by {off:.1e}"
            seconds |= {} if wrong else {name: _seconds(works[name][0])}
        except Exception as failure:  # of a compiler or a driver: it may be of any kind
            wrong = f"fails ({type(failure).__name__}: {failure})"
        if wrong and wanted == name:
            raise ModelError(f"kernels {name} were asked for, but {what} {wrong}: use auto")
        if wrong:
            logger.warning("%s by %s %s: it is not used", what, name, wrong)
    best = wanted if wanted in seconds else min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in seconds.items())
    return best, f"{what} by {best} ({times})"


def _seconds(work: Work) -> float:
    """The least of some runs."""
    taken = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        out = work()
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        taken.append(time.perf_counter() - began)
    return min(taken)
