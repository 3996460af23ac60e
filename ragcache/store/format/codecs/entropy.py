"""The distributions for entropy coding of channels: a fixed family of bell curves.

A byte, the index in the family, names a bell. On chunks of hundreds of tokens, a channel's
own histogram would take more bytes than it saves over the best of these bells.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragcache.errors import ConfigError

_SPREADS = (0.4, 0.64, 1.0, 1.6, 2.5, 4.0)  # in levels; centres lie 3/4 of a spread apart
#: Constriction turns weights with this sum into themselves plus 1.
TOTAL = 1 << 24


@dataclass(frozen=True, eq=False)
class _Bells:
    """Distributions over the symbols 0 to ``levels`` - 1.

    ``weights`` are whole numbers; those of a bell sum to 2^24 - levels, which makes it nothing but
    integers to constriction (``perfect=False``): its scale is then 1 and no product is rounded.
    """

    weights: NDArray[np.float32]  # (bells, levels)

    @property
    def levels(self) -> int:
        return int(self.weights.shape[1])

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """The bits that each symbol costs, (bells, levels); at least 1/16."""
        costs: NDArray[np.float64] = -np.log2((self.weights.astype(np.float64) + 1) / TOTAL)
        return costs

    @cached_property
    def models(self) -> list[Any]:
        """A constriction model for each bell."""
        categorical = constriction_stream().model.Categorical
        return [categorical(bell, perfect=False, lazy=False) for bell in self.weights]

    def best(self, symbols: NDArray[np.int32]) -> NDArray[np.uint8]:
        """For each row of ``symbols``, (channels, tokens), the bell with the shortest code."""
        channels = len(symbols)
        each = symbols + np.arange(channels, dtype=np.int64)[:, None] * self.levels
        counts = np.bincount(each.reshape(-1), minlength=channels * self.levels)
        costs = counts.reshape(channels, self.levels) @ self.bits.T
        chosen: NDArray[np.uint8] = costs.argmin(1).astype(np.uint8)
        return chosen


@lru_cache
def bells(levels: int) -> _Bells:
    """The bells over that many symbols, 3 to 31: at most 256 of them.

    Their order and their weights are part of the formats that use them. They come from whole
    numbers and from products and quotients of doubles, which IEEE 754 rounds alike everywhere: no
    ``exp``, and no sum whose order a machine may choose.
    """
    middle = (levels - 1) / 2
    shapes = []
    for spread in _SPREADS:
        reach = int(middle / (0.75 * spread))
        centres = middle + 0.75 * spread * np.arange(-reach, reach + 1)[:, None]
        ratio = 64 / (64 + ((np.arange(levels) - centres) / spread) ** 2)
        for _ in range(5):  # to the power of 32: Student's bell, close to the normal one
            ratio = ratio * ratio
        shapes.append(np.rint(ratio * 65535).astype(np.int64) + 1)
    heights = np.concatenate(shapes)
    weights = heights * (TOTAL - levels) // heights.sum(1, keepdims=True)
    rest = TOTAL - levels - weights.sum(1)
    weights[np.arange(len(weights)), weights.argmax(1)] += rest
    return _Bells(weights.astype(np.float32))


def constriction_stream() -> Any:
    """``constriction.stream``. Raises ConfigError where constriction is not installed."""
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise ConfigError(
            "codecs 'cachegen' and 'kvtc' need constriction: pip install 'ragcache-fusion[codecs]'"
        ) from error
