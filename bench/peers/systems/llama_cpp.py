"""llama.cpp by llama-cpp-python: prefix reuse, and chunks whose KV is moved to other positions.

`prefix` is ``Llama.generate``, which keeps what a prompt has in common with the prompt before it.
`shifted` uses the low-level API: the KV of every chunk is computed once, after the prefix, in a
sequence of its own. For a prompt, ``llama_memory_seq_add`` moves its positions, which rotates the
keys, and ``llama_memory_seq_cp`` adds it to the prompt's sequence. Nothing is repaired. (The
server's ``--cache-reuse`` moves KV by the same function, but only from the prompt before, and only
in the same order.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama

from bench.peers.protocol import Answered, Ask, Mode, Setup, System, serve

BATCH = 512  # tokens; llama.cpp's default
PROMPT = 0  # the sequence of the prompt; chunks have the following ones


@dataclass
class LlamaCpp(System):
    whole: Llama  # these three have a context each, so that none disturbs another's KV
    prefixes: Llama
    shifted: Shifted
    modes = [Mode("full", "full"), Mode("prefix", "full"), Mode("shifted", "full")]
    distributions = ("llama-cpp-python",)
    settings = "the GGUF file (Q4_1 weights), KV in float16, flash attention, batches of 512"

    def ask(self, ask: Ask) -> Answered:
        if ask.mode == "shifted":
            return self.shifted.ask(ask)
        llama, ids = (self.whole if ask.mode == "full" else self.prefixes), ask.ids
        began = time.perf_counter()
        if ask.mode == "full":
            llama.reset()
            llama._ctx.kv_cache_clear()
        before = llama._input_ids[: llama.n_tokens].tolist()
        # At least the last token is computed, for its logits.
        kept = min(common(before, ids), len(ids) - 1)
        tokens, ttft = list[int](), 0.0
        for token in llama.generate(ids, temp=0.0, top_k=1, reset=ask.mode == "prefix"):
            ttft = ttft or time.perf_counter() - began
            tokens.append(token)
            if len(tokens) == ask.answer or ends(llama._model.model, token):
                break
        return Answered(tokens, ttft, len(ids) - kept)


@dataclass
class Shifted:
    """Stored chunks in one context. A chunk's cells belong to its sequence alone, except while a
    prompt uses them; those of the prefix belong to all."""

    context: Any
    model: Any
    prefix: list[int]
    sequences: dict[tuple[int, ...], int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)  # where a sequence's chunk is now

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.context)

    def store(self, pool: Sequence[Sequence[int]]) -> None:
        self.decode(self.prefix, 0, PROMPT)
        for sequence, chunk in enumerate(pool, PROMPT + 1):
            llama_cpp.llama_memory_seq_cp(self.memory, PROMPT, sequence, -1, -1)
            self.decode(chunk, len(self.prefix), sequence)
            self.sequences[tuple(chunk)] = sequence
            self.positions[sequence] = len(self.prefix)

    def ask(self, ask: Ask) -> Answered:
        began = time.perf_counter()
        at = len(self.prefix)
        for chunk in ask.chunks:
            self.place(self.sequences[tuple(chunk)], len(chunk), at)
            at += len(chunk)
        tokens, ttft, fed = list[int](), 0.0, ask.question
        while len(tokens) < ask.answer:
            logits = self.decode(fed, at, PROMPT)
            at += len(fed)
            tokens.append(int(logits.argmax()))
            ttft = ttft or time.perf_counter() - began
            if ends(self.model, tokens[-1]):
                break
            fed = tokens[-1:]
        # The prompt's sequence keeps the prefix; the chunks keep their cells.
        llama_cpp.llama_memory_seq_rm(self.memory, PROMPT, len(self.prefix), -1)
        return Answered(tokens, ttft, len(ask.question))

    def place(self, sequence: int, length: int, at: int) -> None:
        """Move a chunk to position ``at``, and make it part of the prompt."""
        was = self.positions[sequence]  # the cells of the prefix are in front, and stay
        if was != at:
            llama_cpp.llama_memory_seq_add(self.memory, sequence, was, was + length, at - was)
            self.positions[sequence] = at
        llama_cpp.llama_memory_seq_cp(self.memory, sequence, PROMPT, at, at + length)

    def decode(self, ids: Sequence[int], at: int, sequence: int) -> Any:
        """Logits after the last of ``ids``, which begin at position ``at``."""
        batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            batch.n_tokens = len(part)
            for n, token in enumerate(part):
                batch.token[n], batch.pos[n] = token, at + start + n
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = start + n == len(ids) - 1
            if (status := llama_cpp.llama_decode(self.context, batch)) != 0:
                raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_batch_free(batch)
        count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(count,))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def ends(model: Any, token: int) -> bool:
    """Whether the token ends an answer."""
    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(model), token))


def load(setup: Setup) -> LlamaCpp:
    if not setup.gguf:
        raise ValueError("llama.cpp reads GGUF only: name the file with --gguf")
    whole, prefixes = (
        Llama(
            setup.gguf,
            n_ctx=setup.longest,
            n_batch=BATCH,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            flash_attn=True,  # faster here, and the default of llama.cpp's own programs
            verbose=False,
        )
        for _ in range(2)
    )
    # Llama has no argument for the number of sequences.
    options = llama_cpp.llama_context_default_params()
    stored = len(setup.prefix) + sum(map(len, setup.pool))
    options.n_ctx, options.n_batch = stored + setup.longest, BATCH
    options.n_threads = options.n_threads_batch = setup.threads
    options.n_seq_max, options.kv_unified = len(setup.pool) + 1, True
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    model = whole._model.model
    shifted = Shifted(llama_cpp.llama_init_from_model(model, options), model, setup.prefix)
    shifted.store(setup.pool)
    return LlamaCpp(whole, prefixes, shifted)


if __name__ == "__main__":
    serve(load)
