"""The self-test of a model at load: refuse models whose KV ragcache cannot move and reuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ragcache.engine.base import (
    AttentionCall,
    AttentionRule,
    LayerView,
    PrefillCallbacks,
    Prefiller,
)
from ragcache.errors import ModelError
from ragcache.types import ChunkKV, Tokens

__all__ = ["check_engine", "supports_attention_rules"]

#: Largest error that is accepted, relative to the norm of the expected tensor.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
#: Largest relative error of a key that was moved: (4 + 2 ** 0.5) / 2 of the dtype's epsilon, since
#: a rounding is off by at most half an epsilon. A model that rotates in its own precision rounds
#: two products and their sum; storing, placing, and a factor on cos and sin, such as YaRN's, round
#: once each. The limit is wider in float32, where kernels differ; it is still a thousandth of the
#: error that a wrong angle makes.
_ROPE_TOLERANCE = {"float32": 1e-5, "bfloat16": 2.11e-2, "float16": 2.64e-3}
_LENGTH, _FEW_ROWS, _TOKENS = 24, 8, 2
_POSITIONS = 5, 7919  # to which single keys are moved, besides the end of the context

_Pair = tuple[Tensor, Tensor]  # as placed, and as computed


def check_engine(engine: Prefiller, vocabulary: int, context: int) -> None:
    """Raise ModelError unless, on a few random tokens below ``vocabulary``,

    1. in each layer alone, keys stored before RoPE and placed at several positions up to
       ``context`` (tokens) equal keys computed there,
    2. a prefill of all rows with callbacks gives the logits of the plain forward,
    3. a later token changes no earlier row's KV (causal attention),
    4. KV of several tokens placed a few positions further equals KV computed there, and
    5. computing only a few rows from a middle layer on, with the rest placed, gives the logits of
       the plain forward.
    """
    limit = _TOLERANCE[engine.spec.dtype]
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(1, vocabulary, (_LENGTH,), generator=generator).tolist())
    for token in ids[:_TOKENS]:
        _check_rope(engine, token, context)
    want = engine.prefill(ids).logits
    stored = engine.encode([ids])[0]
    changed = engine.encode([(*ids[:-1], ids[0])])[0]
    checks = {
        "a prefill with callbacks does not give the model's own logits": _error(
            engine.prefill(ids, _Replay(stored, _LENGTH)).logits, want
        ),
        "a later token changes earlier rows (it does not attend causally)": _largest(
            _error(a[:, :-1], b[:, :-1]) for a, b in zip(changed.keys, stored.keys, strict=True)
        ),
        "its keys cannot be moved to other positions": _largest(
            _error(placed, fresh)
            for layer in _placed_and_computed(engine, stored, 5)
            for placed, fresh in layer
        ),
        "computing a few rows among placed ones does not give the model's own logits": _error(
            engine.prefill(ids, _Replay(stored, _FEW_ROWS)).logits, want
        ),
    }
    for what, error in checks.items():
        _check_error(engine, what, error, limit)


def _check_rope(engine: Prefiller, token: int, context: int) -> None:
    """Move the keys of one token over the context, and compare each with a key computed there.

    An AttentionRule lets the token attend only to itself, so that its keys at two positions differ
    by their rotation only. Errors of earlier layers then do not hide those of a later one, and the
    tolerance can be that of rounding. With a theta of a million, keys at neighbouring positions are
    almost equal, but at the end of the context they are rotated far.
    """
    taking = _TakeRow()
    engine.prefill((token,), taking, attend=_alone)
    stored = ChunkKV((token,), *zip(*taking.taken, strict=True))
    end = max(1, context - _LENGTH)
    for position in (*(at for at in _POSITIONS if at < end), end):
        for layer, ((placed, fresh), _) in enumerate(
            _placed_and_computed(engine, stored, position, _alone)
        ):
            error = _largest(_error(a, b) for a, b in zip(placed, fresh, strict=True))
            what = f"the keys of layer {layer} cannot be moved to position {position}"
            _check_error(engine, what, error, _ROPE_TOLERANCE[engine.spec.dtype])


def _alone(call: AttentionCall) -> Tensor:
    """Attention of a single token to itself, without attention sinks: its values."""
    return call.values.repeat_interleave(len(call.queries) // len(call.values), 0)


def _check_error(engine: Prefiller, what: str, error: float, limit: float) -> None:
    if not error <= limit:  # NaN fails too
        raise ModelError(
            f"{engine.name} cannot be used: {what} (relative error {error:.1e}, allowed "
            f"{limit:.0e}). Its answers would be silently wrong; use another model or dtype."
        )


def supports_attention_rules(engine: Prefiller) -> bool:
    """Whether an AttentionRule receives the attention of every layer, and can compute it.

    Tested on a few random tokens, with all rows and with a few rows among placed ones.
    """
    generator = torch.Generator().manual_seed(1)
    ids = tuple(torch.randint(1, 64, (_LENGTH,), generator=generator).tolist())
    stored = engine.encode([ids])[0]
    layers: list[int] = []

    def rule(call: AttentionCall) -> Tensor:
        layers.append(call.layer)
        return call.attend(call.softmax(call.scores()))

    for rows in (_LENGTH, _FEW_ROWS):
        want = engine.prefill(ids, _Replay(stored, rows)).logits
        got = engine.prefill(ids, _Replay(stored, rows), attend=rule).logits
        if not _error(got, want) <= _TOLERANCE[engine.spec.dtype]:
            return False
    return layers == 2 * list(range(engine.spec.layers))


def supports_packing(
    encode_together: Callable[[Sequence[Tokens], Tokens], list[ChunkKV]], dtype: str
) -> bool:
    """Whether chunks that are encoded in one forward get the same KV as chunks encoded one by one.

    ``encode_together`` takes chunks and their context. Tested on a few random tokens, in two
    chunks of different lengths, with and without a context.
    """
    generator = torch.Generator().manual_seed(2)
    ids = tuple(torch.randint(1, 64, (_LENGTH,), generator=generator).tolist())
    prefix, chunks = ids[: _FEW_ROWS // 2], (ids[_FEW_ROWS // 2 : _FEW_ROWS], ids[_FEW_ROWS:])
    errors = [
        _error(a, b)
        for context in ((), prefix)
        for chunk, together in zip(chunks, encode_together(chunks, context), strict=True)
        for alone in encode_together([chunk], context)
        for a, b in zip(together.keys + together.values, alone.keys + alone.values, strict=True)
    ]
    return all(error <= _TOLERANCE[dtype] for error in errors)


def _placed_and_computed(
    engine: Prefiller, stored: ChunkKV, position: int, attend: AttentionRule | None = None
) -> list[tuple[_Pair, _Pair]]:
    """Per layer, pairs of keys and of values: as placed at ``position``, and as computed there."""
    probe = _PlaceThenCompute(stored)
    tokens = stored.tokens
    positions = range(position, position + len(tokens))
    engine.prefill(tokens, probe, positions=positions, attend=attend)
    return probe.pairs


def _largest(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is NaN."""
    return float(torch.tensor([*errors]).max())


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


class _Replay(PrefillCallbacks):
    """Computes all rows in the first half of the layers, and ``rows`` of them in the second half.

    In the second half, one row near the beginning and the last ``rows - 1`` are computed, and the
    others are placed. The last layer of the first half computes the KV of all rows, but its output
    for those rows only.
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


class _TakeRow(PrefillCallbacks):
    """Computes a single row and collects its KV."""

    def __init__(self) -> None:
        self.taken: list[tuple[Tensor, Tensor]] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = kv
        return torch.arange(1)

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.taken.append(self.view.take(0, 1))


class _PlaceThenCompute(PrefillCallbacks):
    """Places stored KV, and collects it, after RoPE, with the KV that the model computes."""

    def __init__(self, stored: ChunkKV) -> None:
        self.stored = stored
        self.pairs: list[tuple[_Pair, _Pair]] = []  # per layer, of keys and of values

    def before(self, layer: int, kv: LayerView) -> Tensor:
        rows = torch.arange(len(self.stored.tokens))
        kv.place(0, [(self.stored.keys[layer], self.stored.values[layer])])
        self.placed = kv.read(rows)
        return rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        placed_keys, placed_values = self.placed
        self.pairs.append(((placed_keys, keys), (placed_values, values)))
