"""The self-check at load: an architecture nobody tried is refused, not got silently wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragcache.engine.base import AttentionCall, LayerView, Prefiller, Walk
from ragcache.errors import ModelError

if TYPE_CHECKING:
    from ragcache.types import ChunkKV

#: Largest error accepted, relative to the norm of what is compared.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
_LENGTH, _BEHIND = 24, 8


def check_engine(engine: Prefiller, vocabulary: int) -> None:
    """Raise ModelError unless, on a few random tokens below ``vocabulary``,

    1. walking all rows gives the plain forward's logits,
    2. a later token changes no earlier row's KV (causal),
    3. KV stored before RoPE and placed at other positions equals KV computed there, and
    4. computing only a few rows from some layer on, the rest placed, gives the plain logits.
    """
    limit = _TOLERANCE[engine.spec.dtype]
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(1, vocabulary, (_LENGTH,), generator=generator).tolist())
    want = engine.prefill(ids).logits
    stored = engine.encode([ids])[0]
    changed = engine.encode([(*ids[:-1], ids[0])])[0]
    checks = {
        "walking all rows does not give the model's own logits": _error(
            engine.prefill(ids, _Replay(stored, _LENGTH)).logits, want
        ),
        "a later token changes earlier rows (it does not attend causally)": max(
            _error(a[:, :-1], b[:, :-1]) for a, b in zip(changed.keys, stored.keys, strict=True)
        ),
        "its keys cannot be moved to other positions": _shift_error(engine, ids, stored),
        "computing a few rows among placed ones does not give the model's own logits": _error(
            engine.prefill(ids, _Replay(stored, _BEHIND)).logits, want
        ),
    }
    for what, error in checks.items():
        if not error <= limit:  # NaN fails too
            raise ModelError(
                f"{engine.name} cannot be used: {what} (relative error {error:.1e}, allowed "
                f"{limit:.0e}). Its answers would be silently wrong; use another model or dtype."
            )


def watchable(engine: Prefiller) -> bool:
    """Whether an AttentionRule sees every layer's attention and can compute it as the model does.

    Tried on a few random tokens, all rows and then few rows among placed ones, and one token of
    the answer.
    """
    generator = torch.Generator().manual_seed(1)
    ids = tuple(torch.randint(1, 64, (_LENGTH,), generator=generator).tolist())
    stored = engine.encode([ids])[0]
    layers: list[int] = []

    def rule(call: AttentionCall) -> Tensor:
        layers.append(call.layer)
        return call.attend(call.softmax(call.scores()))

    for rows in (_LENGTH, _BEHIND):
        want = engine.prefill(ids, _Replay(stored, rows)).logits
        got = engine.prefill(ids, _Replay(stored, rows), attend=rule).logits
        if not _error(got, want) <= _TOLERANCE[engine.spec.dtype]:
            return False
    return layers == 2 * list(range(engine.spec.layers))


def packable(engine: Prefiller) -> bool:
    """Whether chunks that are encoded together come out as each of them by itself.

    Tried on a few random tokens, in two chunks of unlike length, by themselves and behind others.
    """
    generator = torch.Generator().manual_seed(2)
    ids = tuple(torch.randint(1, 64, (_LENGTH,), generator=generator).tolist())
    behind, chunks = ids[: _BEHIND // 2], (ids[_BEHIND // 2 : _BEHIND], ids[_BEHIND:])
    errors = [
        _error(a, b)
        for before in ((), behind)
        for chunk, together in zip(chunks, engine.encode(chunks, behind=before), strict=True)
        for alone in engine.encode([chunk], behind=before)
        for a, b in zip(together.keys + together.values, alone.keys + alone.values, strict=True)
    ]
    return all(error <= _TOLERANCE[engine.spec.dtype] for error in errors)


def _shift_error(engine: Prefiller, ids: tuple[int, ...], stored: ChunkKV) -> float:
    """Place KV from positions 0.. at positions 5.., against a forward at 5.. itself."""
    probe = _Shifted(stored)
    engine.prefill(ids, probe, positions=range(5, 5 + len(ids)))
    return max(probe.errors)


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


class _Replay(Walk):
    """Computes all rows at first; from the middle layer on only some, the others placed.

    Those are one early row, all by itself, and the last ``rows - 1``. The layer before the middle
    computes the KV of all rows, and the rest for those only.
    """

    def __init__(self, stored: ChunkKV, rows: int) -> None:
        self.stored = stored
        every = torch.arange(len(stored.tokens))
        first = len(every) - rows + 1
        self.every, self.few = (
            every,
            every if first <= 1 else every[[first // 2, *range(first, len(every))]],
        )

    def before(self, layer: int, kv: LayerView) -> Tensor:
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        return self.every if layer < len(self.stored.keys) // 2 else self.few

    def narrows(self, layer: int) -> bool:
        return layer == len(self.stored.keys) // 2 - 1

    def narrowed(self, layer: int) -> Tensor:
        return self.few


class _Shifted(Walk):
    """Places stored KV, reads it back after RoPE, and compares with what the model computes."""

    def __init__(self, stored: ChunkKV) -> None:
        self.stored = stored
        self.errors: list[float] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        rows = torch.arange(len(self.stored.tokens))
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        self.placed = kv.read(rows)
        return rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        pairs = zip(self.placed, (keys, values), strict=True)
        self.errors += [_error(placed, fresh) for placed, fresh in pairs]
