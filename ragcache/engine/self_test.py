"""The self-check at load: an architecture nobody tried is refused, not got silently wrong."""

from __future__ import annotations

from collections.abc import Iterable

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
from ragcache.types import ChunkKV

#: Largest error accepted, relative to the norm of what is compared.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
#: The same of a key that was moved, and nothing else: (4 + 2 ** 0.5) / 2 of the dtype's epsilon,
#: for each rounding is off by half of it at most. A model that rotates in its own precision rounds
#: two products and their sum; storing, placing and a factor on cos and sin, such as YaRN's, round
#: once each. Float32 is allowed more, for kernels' sake: a thousandth of what a wrong angle does.
_MOVED = {"float32": 1e-5, "bfloat16": 2.11e-2, "float16": 2.64e-3}
_LENGTH, _BEHIND, _TOKENS = 24, 8, 2
_FAR = 5, 7919  # positions that single keys are moved to, besides the end of the context

_Pair = tuple[Tensor, Tensor]  # as placed, and as computed


def check_engine(engine: Prefiller, vocabulary: int, context: int) -> None:
    """Raise ModelError unless, on a few random tokens below ``vocabulary``,

    1. in every layer by itself, keys stored before RoPE and placed anywhere in ``context``
       (tokens) equal those computed there,
    2. computing all rows through the hooks gives the plain forward's logits,
    3. a later token changes no earlier row's KV (causal),
    4. KV of several tokens placed a little further on equals KV computed there, and
    5. computing only a few rows from some layer on, the rest placed, gives the plain logits.
    """
    limit = _TOLERANCE[engine.spec.dtype]
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(1, vocabulary, (_LENGTH,), generator=generator).tolist())
    for token in ids[:_TOKENS]:
        _check_moves(engine, token, context)
    want = engine.prefill(ids).logits
    stored = engine.encode([ids])[0]
    changed = engine.encode([(*ids[:-1], ids[0])])[0]
    checks = {
        "computing all rows through the hooks does not give the model's own logits": _error(
            engine.prefill(ids, _Replay(stored, _LENGTH)).logits, want
        ),
        "a later token changes earlier rows (it does not attend causally)": _worst(
            _error(a[:, :-1], b[:, :-1]) for a, b in zip(changed.keys, stored.keys, strict=True)
        ),
        "its keys cannot be moved to other positions": _worst(
            _error(placed, fresh) for layer in _moved(engine, stored, 5) for placed, fresh in layer
        ),
        "computing a few rows among placed ones does not give the model's own logits": _error(
            engine.prefill(ids, _Replay(stored, _BEHIND)).logits, want
        ),
    }
    for what, error in checks.items():
        _hold(engine, what, error, limit)


def _check_moves(engine: Prefiller, token: int, context: int) -> None:
    """Move the keys of one token over the context, and hold each to its own norm.

    The token attends to itself alone, in the model's place, so that its keys differ from position
    to position by their rotation and by nothing else: no layer's error is hidden by what layers
    before it do, and the limit can be that of rounding. At the end of the context a layer's keys
    have turned far, even where a theta of a million leaves neighbours all but equal.
    """
    taking = _Taking()
    engine.prefill((token,), taking, attend=_alone)
    stored = ChunkKV((token,), *zip(*taking.taken, strict=True))
    end = max(1, context - _LENGTH)
    for position in (*(at for at in _FAR if at < end), end):
        for layer, ((placed, fresh), _) in enumerate(_moved(engine, stored, position, _alone)):
            error = _worst(_error(a, b) for a, b in zip(placed, fresh, strict=True))
            what = f"the keys of layer {layer} cannot be moved to position {position}"
            _hold(engine, what, error, _MOVED[engine.spec.dtype])


def _alone(call: AttentionCall) -> Tensor:
    """What the attention of a single token gives, were there no attention sinks."""
    return call.values.repeat_interleave(len(call.queries) // len(call.values), 0)


def _hold(engine: Prefiller, what: str, error: float, limit: float) -> None:
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


def _moved(
    engine: Prefiller, stored: ChunkKV, position: int, attend: AttentionRule | None = None
) -> list[tuple[_Pair, _Pair]]:
    """Of each layer, keys and then values, as placed at ``position`` and as computed there."""
    probe = _Shifted(stored)
    tokens = stored.tokens
    positions = range(position, position + len(tokens))
    engine.prefill(tokens, probe, positions=positions, attend=attend)
    return probe.pairs


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN if any is."""
    return float(torch.tensor([*errors]).max())


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


class _Replay(PrefillCallbacks):
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


class _Taking(PrefillCallbacks):
    """Computes a single row and takes its KV."""

    def __init__(self) -> None:
        self.taken: list[tuple[Tensor, Tensor]] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = kv
        return torch.arange(1)

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.taken.append(self.view.take(0, 1))


class _Shifted(PrefillCallbacks):
    """Places stored KV, reads it back after RoPE, and keeps it with what the model computes."""

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
