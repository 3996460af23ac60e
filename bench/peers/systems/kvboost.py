"""kvboost: pieces of fixed size, counted from the prompt's beginning, repaired by a full pass.

``KVBoost.generate`` takes text. It is given token ids through its tokenizer's ``encode``, so that
it computes the same tokens as the others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from kvboost import GenerationMode, KVBoost
from kvboost.compat import check_model_compatibility
from transformers import AutoTokenizer

from bench.peers.protocol import Answered, Ask, Mode, Setup, System, serve
from bench.peers.systems.transformers import load_model

CHUNK = 128  # tokens; kvboost's default
BYTES = 2 << 30
#: Those of kvboost's own published measurements (its README, "KVBoost config").
PUBLISHED = {"chunk_boundary_window": 16, "overlap_k": 16, "sink_tokens": 32}
PADDED = f"prefix and chunks padded to multiples of {CHUNK} tokens"


class IdTokenizer:
    """The model's tokenizer, but what it encodes are ids already."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: Any, **options: Any) -> Any:
        return text if isinstance(text, list) else self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass
class Kvboost(System):
    engines: dict[str, Any]  # by mode, on one model
    pad: int  # the id of a line break
    rows: list[int]  # counts what goes through the model's layers
    modes = [
        Mode("full", "full"),
        Mode("prefix", "full"),
        Mode("chunks", "full"),
        Mode("full, padded", "full, padded", PADDED),
        Mode("chunks, padded", "full, padded", PADDED),
    ]
    distributions = ("kvboost", "torch", "transformers")
    settings = (
        "float32 (its from_pretrained takes float16), cacheblend, chunk 128; "
        "boundary window 16, overlap 16, sink 32, but for padded prompts"
    )

    def ask(self, ask: Ask) -> Answered:
        mode = {"full": GenerationMode.BASELINE, "prefix": GenerationMode.PREFIX_CACHE}.get(
            ask.mode.split(",")[0], GenerationMode.CHUNK_KV_REUSE
        )
        if ask.mode.endswith("padded"):
            ask = padded(ask, self.pad)
        tokens: list[int] = []
        ttft, rows, began = 0.0, 0, time.perf_counter()
        self.rows[0] = 0

        def told(token: int) -> None:
            nonlocal ttft, rows
            if not tokens:
                ttft, rows = time.perf_counter() - began, self.rows[0]
            tokens.append(token)

        engine = self.engines[ask.mode]
        done = engine.generate(ask.ids, max_new_tokens=ask.answer, mode=mode, on_token=told)
        assert done.generated_tokens == len(tokens)
        return Answered(tokens, ttft, rows)


def padded(ask: Ask, pad: int) -> Ask:
    """The prompt with line breaks after its prefix and its chunks, so that every chunk begins at a
    multiple of CHUNK tokens."""
    return replace(
        ask,
        prefix=whole_chunks(ask.prefix, pad),
        chunks=[whole_chunks(chunk, pad) for chunk in ask.chunks],
    )


def whole_chunks(ids: list[int], pad: int) -> list[int]:
    return [*ids, *[pad] * (-len(ids) % CHUNK)]


def load(setup: Setup) -> Kvboost:
    model, rows = load_model(setup), [0]
    check_model_compatibility(model)
    tokenizer = IdTokenizer(AutoTokenizer.from_pretrained(setup.model))
    (pad,) = tokenizer.encode("\n", add_special_tokens=False)

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        rows[0] += inputs[0].shape[1]

    model.get_input_embeddings().register_forward_pre_hook(count)

    def engine(**options: Any) -> Any:
        return KVBoost(
            model,
            tokenizer,
            max_cache_bytes=BYTES,
            max_chunks=4096,
            chunk_size=CHUNK,
            recompute_strategy="cacheblend",
            device="cpu",
            **options,
        )

    engines = {
        "full": engine(),
        "prefix": engine(**PUBLISHED),
        "chunks": engine(**PUBLISHED),
        "full, padded": engine(),
        "chunks, padded": engine(),
    }
    for mode in ("prefix", "chunks"):
        engines[mode].warm(setup.prefix)
    for chunk in setup.pool:
        engines["chunks"].warm(chunk)
    engines["chunks, padded"].warm(whole_chunks(setup.prefix, pad))
    for chunk in setup.pool:
        engines["chunks, padded"].warm(whole_chunks(chunk, pad))
    return Kvboost(engines, pad, rows)


if __name__ == "__main__":
    serve(load)
