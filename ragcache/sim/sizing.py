"""What a corpus of so many chunks takes: bytes, time and money, before any of it is computed.

Nothing here is measured: the figures follow from a model's shape and from what machines and prices
are said to be. A chunk costs two prefills to precompute (its KV, and its sensitivity) and saves
1 - r of one each time that it is used, r being the share that is recomputed all the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.errors import ConfigError, ModelError
from ragcache.planning.flops import Model
from ragcache.store.format.codecs import codec
from ragcache.types import KVSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Models by the names of their makers, whose shapes need no model hub.
SHAPES: Mapping[str, Model] = {
    "qwen2.5-0.5b": Model(KVSpec(24, 2, 64, "bfloat16"), 494_000_000, 14),
    "qwen2.5-7b": Model(KVSpec(28, 4, 128, "bfloat16"), 7_620_000_000, 28),
    "mistral-7b": Model(KVSpec(32, 8, 128, "bfloat16"), 7_250_000_000, 32),
    "llama-3.1-8b": Model(KVSpec(32, 8, 128, "bfloat16"), 8_030_000_000, 32),
    "llama-3.1-70b": Model(KVSpec(80, 8, 128, "bfloat16"), 70_600_000_000, 64),
}
_CACHEGEN = 0.262  # bytes a number: docs/codecs.md, large
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True, slots=True)
class Prices:
    """What machines do and cost."""

    flops: float = 400e12  # a second, of one GPU, as a prefill gets them
    gpu_hour: float = 2.5
    gb_month: float = 0.023  # of 10^9 bytes, where the store lives
    link: float = 1.25e9  # bytes a second from there to a GPU


@dataclass(frozen=True, slots=True)
class Sizing:
    """What ``chunks`` chunks take. Money in the unit of the prices."""

    chunks: int
    bytes: float
    month: float  # to keep them
    gpu_s: float  # to precompute them, on one GPU
    gpu: float
    copy_s: float  # over the link
    load_s: float  # of one chunk, over the link,
    prefill_s: float  # and to compute it instead
    reuses: float  # a month, of a chunk, from which on keeping it is cheaper than computing it
    first_reuses: float  # the same for its first month, which pays for its making


def shape(name: str) -> Model:
    """The model of a name in :data:`SHAPES`, a folder or a name of the model hub; of the latter
    its configuration is read, and no weights. Raises ModelError."""
    if name in SHAPES:
        return SHAPES[name]
    from ragcache.engine.hf.loading import build_without_weights
    from ragcache.models import model_path
    from ragcache.models.checkpoint import Configuration

    try:
        made = build_without_weights(Configuration.read(model_path(name)))
    except ModelError as error:
        raise ModelError(
            f"{name!r} is none of {', '.join(SHAPES)}, whose shapes are known, and: {error}"
        ) from error
    config = made.config
    text = config.get_text_config()
    heads = text.num_attention_heads
    spec = KVSpec(
        text.num_hidden_layers,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch."),
    )
    return Model(spec, sum(weight.numel() for weight in made.parameters()), heads)


def rate(text: str) -> float:
    """Bytes a second of ``10Gbit/s`` or ``1.5GB/s``. Raises ConfigError for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(bit|b|B)(?:/s|ps)?", text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no rate: give one such as 10Gbit/s or 1.5GB/s")
    number = float(found[1]) * _PREFIXES[found[2]]
    if not number:
        raise ConfigError(f"{text!r} moves nothing: give more than 0")
    return number if found[3] == "B" else number / 8


def chunk_bytes(model: Model, tokens: int, codec_name: str) -> float:
    """Of a chunk as it is stored; of cachegen, whose sizes depend on the values, about."""
    spec = model.spec
    layer = codec(codec_name).layer_bytes(spec, tokens)
    if layer is not None:
        return spec.layers * layer
    return _CACHEGEN * spec.chunk_bytes(tokens) / spec.itemsize


def sizing(
    model: Model,
    chunks: int,
    prices: Prices,
    *,
    tokens: int = 256,
    prefix: int = 32,
    codec_name: str = "raw",
    ratio: float = 0.15,
) -> Sizing:
    """Of chunks of ``tokens`` tokens, behind ``prefix`` others."""
    if chunks < 1 or tokens < 1 or not 0 <= ratio < 1:
        raise ConfigError(
            f"{chunks} chunks of {tokens} tokens at ratio {ratio}: give at least 1 of each, and a "
            "ratio from 0 to below 1"
        )
    size = chunk_bytes(model, tokens, codec_name)
    prefill_s = model.flops(tokens, prefix) / prices.flops
    second = prices.gpu_hour / 3600
    kept = size / 1e9 * prices.gb_month  # a month
    saved = (1 - ratio) * prefill_s * second  # a use
    return Sizing(
        chunks=chunks,
        bytes=chunks * size,
        month=chunks * kept,
        gpu_s=chunks * 2 * prefill_s,
        gpu=chunks * 2 * prefill_s * second,
        copy_s=chunks * size / prices.link,
        load_s=size / prices.link,
        prefill_s=prefill_s,
        reuses=kept / saved,
        first_reuses=(kept + 2 * prefill_s * second) / saved,
    )


def break_even_link(one: Sizing, ratio: float = 0.15) -> float:
    """Bytes a second from which on loading a chunk takes no longer than computing what it saves."""
    return one.bytes / one.chunks / ((1 - ratio) * one.prefill_s)
