"""Estimate the bytes, time and money that precomputing and storing a corpus takes.

Nothing is measured: the figures follow from a model's shape and from given speeds and prices. A
chunk costs two prefills to precompute (its KV and its sensitivity), and each use saves 1 - r of a
prefill, where r is the share of its tokens that is recomputed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragcache.errors import ConfigError, ModelError
from ragcache.planning.flops import ModelShape
from ragcache.store.format.codecs import expected_bytes
from ragcache.types import KVSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CorpusEstimate",
    "HardwarePrices",
    "break_even_bandwidth",
    "estimate_corpus",
    "model_shape",
    "parse_bandwidth",
]

#: Shapes of well-known models, which need no model hub.
MODEL_SHAPES: Mapping[str, ModelShape] = {
    "qwen2.5-0.5b": ModelShape(KVSpec(24, 2, 64, "bfloat16"), 494_000_000, 14),
    "qwen2.5-7b": ModelShape(KVSpec(28, 4, 128, "bfloat16"), 7_620_000_000, 28),
    "mistral-7b": ModelShape(KVSpec(32, 8, 128, "bfloat16"), 7_250_000_000, 32),
    "llama-3.1-8b": ModelShape(KVSpec(32, 8, 128, "bfloat16"), 8_030_000_000, 32),
    "llama-3.1-70b": ModelShape(KVSpec(80, 8, 128, "bfloat16"), 70_600_000_000, 64),
}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True, slots=True)
class HardwarePrices:
    """Speeds and prices of hardware; money is in any one unit."""

    flops: float = 400e12  # FLOP/s that a prefill reaches on one GPU
    gpu_hour: float = 2.5  # price
    gb_month: float = 0.023  # price of storing 10^9 bytes for a month
    link: float = 1.25e9  # bytes per second from the store to a GPU


@dataclass(frozen=True, slots=True)
class CorpusEstimate:
    """The cost of ``chunks`` chunks. Money is in the unit of the prices."""

    chunks: int
    bytes: float
    month: float  # price of storing all chunks for a month
    gpu_s: float  # time to precompute all chunks on one GPU
    gpu: float  # price of that time
    copy_s: float  # time to copy all chunks over the link
    load_s: float  # time to load one chunk over the link
    prefill_s: float  # time to compute one chunk instead
    reuses: float  # uses of a chunk per month at which storing costs as much as computing
    first_reuses: float  # the same for the first month, including precomputing


def model_shape(name: str) -> ModelShape:
    """The shape of a model in :data:`MODEL_SHAPES`, a folder, a GGUF file, or a hub name.

    Only a hub model's configuration is downloaded, not its weights. Raises ModelError.
    """
    if name in MODEL_SHAPES:
        return MODEL_SHAPES[name]
    from ragcache.engine.hf.loading import build_without_weights
    from ragcache.engine.hf.model_info import kv_spec
    from ragcache.models import model_path
    from ragcache.models.checkpoint import ModelConfig

    try:
        made = build_without_weights(ModelConfig.read(model_path(name)))
    except ModelError as error:
        raise ModelError(
            f"{name!r} is none of {', '.join(MODEL_SHAPES)}, whose shapes are known, and: {error}"
        ) from error
    text = made.config.get_text_config()
    dtype = str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    parameters = sum(weight.numel() for weight in made.parameters())
    return ModelShape(kv_spec(made.config, dtype), parameters, text.num_attention_heads)


def parse_bandwidth(text: str) -> float:
    """Bytes per second of ``10Gbit/s`` or ``1.5GB/s``. Raises ConfigError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(bit|b|B)(?:/s|ps)?", text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is not a bandwidth: give one such as 10Gbit/s or 1.5GB/s")
    number = float(found[1]) * _PREFIXES[found[2]]
    if not number:
        raise ConfigError(f"{text!r} is no bandwidth at all: give more than 0")
    return number if found[3] == "B" else number / 8


def estimate_corpus(
    model: ModelShape,
    chunks: int,
    prices: HardwarePrices,
    *,
    tokens: int = 256,
    prefix: int = 32,
    codec_name: str = "raw",
    ratio: float = 0.15,
) -> CorpusEstimate:
    """Estimate the cost of ``chunks`` chunks of ``tokens`` tokens, encoded after ``prefix`` more.

    Raises ConfigError for less than 1 chunk or token, or a ``ratio`` outside [0, 1).
    """
    if chunks < 1 or tokens < 1 or not 0 <= ratio < 1:
        raise ConfigError(
            f"{chunks} chunks of {tokens} tokens at ratio {ratio}: give at least 1 of each, and a "
            "ratio from 0 to below 1"
        )
    size = expected_bytes(codec_name, model.spec, tokens)
    prefill_s = model.flops(tokens, prefix) / prices.flops
    second = prices.gpu_hour / 3600
    stored = size / 1e9 * prices.gb_month  # price of a chunk per month
    saved = (1 - ratio) * prefill_s * second  # price saved per use
    return CorpusEstimate(
        chunks=chunks,
        bytes=chunks * size,
        month=chunks * stored,
        gpu_s=chunks * 2 * prefill_s,
        gpu=chunks * 2 * prefill_s * second,
        copy_s=chunks * size / prices.link,
        load_s=size / prices.link,
        prefill_s=prefill_s,
        reuses=stored / saved,
        first_reuses=(stored + 2 * prefill_s * second) / saved,
    )


def break_even_bandwidth(one: CorpusEstimate, ratio: float = 0.15) -> float:
    """Bytes per second at which loading a chunk takes as long as the computation that it saves."""
    return one.bytes / one.chunks / ((1 - ratio) * one.prefill_s)
