"""Sizes and costs of corpora: ``python -m bench.sizes``.

As ``ragcache plan`` computes them, for chunks of 256 tokens after a prefix of 32; a GPU that
reaches 400 TFLOP/s in a prefill and costs 2.5 per hour; storage at 0.023 per month and 10^9 bytes;
a link of 10 Gbit/s. *Pays from* is the number of uses of a chunk per month above which its storage
costs less than the 85 % of a prefill that each use saves. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import results
from ragcache.cli.render import decimal, duration
from ragcache.sim.sizing import (
    MODEL_SHAPES,
    CorpusEstimate,
    HardwarePrices,
    break_even_bandwidth,
    estimate_corpus,
)

CODECS = "raw", "int8", "cachegen", "kvtc16"
CHUNKS = tuple(10**power for power in range(4, 10))
TOKENS = 256


@dataclass(frozen=True)
class Row:
    model: str
    codec: str
    sizing: CorpusEstimate


def measure(model: str = "llama-3.1-8b") -> list[Row]:
    """All models at 10^6 chunks, and ``model`` at all sizes."""
    pairs = [(name, codec, 10**6) for name in MODEL_SHAPES for codec in CODECS]
    pairs += [(model, codec, count) for codec in ("raw", "cachegen", "kvtc16") for count in CHUNKS]
    return [
        Row(
            name,
            codec,
            estimate_corpus(
                MODEL_SHAPES[name], count, HardwarePrices(), tokens=TOKENS, codec_name=codec
            ),
        )
        for name, codec, count in pairs
    ]


def table(found: Sequence[Row]) -> str:
    chunks = [
        [
            row.model,
            row.codec,
            decimal(row.sizing.bytes / row.sizing.chunks / TOKENS),
            f"{1e3 * row.sizing.prefill_s:.1f} ms",
            f"{1e3 * row.sizing.load_s:.1f} ms",
            f"{decimal(break_even_bandwidth(row.sizing))}/s",
            f"{row.sizing.reuses:.0f} uses",
        ]
        for row in found[: len(MODEL_SHAPES) * len(CODECS)]
    ]
    corpora = [
        [
            f"{row.sizing.chunks:,}",
            row.codec,
            decimal(row.sizing.bytes),
            f"{row.sizing.month:,.1f}",
            f"{row.sizing.gpu_s / 3600:,.1f}",
            f"{row.sizing.gpu:,.1f}",
            duration(row.sizing.copy_s),
        ]
        for row in found[len(MODEL_SHAPES) * len(CODECS) :]
    ]
    heads = "model", "codec", "a token", "computed in", "loaded in", "link as fast", "pays from"
    sizes = "chunks", "codec", "bytes", "a month", "GPU hours", "GPU price", "over the link"
    return f"{results.table(heads, chunks)}\n{results.table(sizes, corpora)}"


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODEL_SHAPES)
    given = vars(parser.parse_args())
    out = given.pop("out")
    found = measure(**given)
    results.finish("sizes", found, table(found), out)


if __name__ == "__main__":
    main()
