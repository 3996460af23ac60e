"""Measure the sensitivity of tokens: how much a token's KV depends on what precedes its chunk.

This dependence is mostly a property of the token: "She" refers to a name in the context, and "Oslo"
does not. So it is measured once, when the chunk is precomputed, and costs nothing at query time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ragcache.blend.ranking import band

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.engine.base import ChunkEngine
    from ragcache.types import ChunkKV, Tokens

#: The passage that every chunk is computed after a second time, to see how much its KV changes. It
#: names a woman, a man, a company, a town, a year and a trade, so that most references of a chunk
#: find something to refer to.
PASSAGE = (
    "Margaret Hale was born in Leeds in 1961 and trained as an engineer. She later moved to "
    "Boston, where she founded a company that builds bridges.",
    "The company was sold in 2004. Its headquarters are in Geneva, and it employs about three "
    "hundred people.",
    "Riverton is a small town on the coast. It was founded in the twelfth century and is known for "
    "its harbour. Thomas Berg has been its mayor since 2015. He likes to sail.",
)


def preceding_passage(engine: ChunkEngine) -> Tokens:
    """Ids of :data:`PASSAGE`, tokenised as the chunks of a prompt."""
    return tuple(token for text in PASSAGE for token in engine.template.chunk(text))


def measure_sensitivity(
    engine: ChunkEngine, alone: Sequence[ChunkKV], context: Tokens
) -> list[ChunkKV]:
    """The chunks ``alone``, which were computed after ``context``, with the sensitivity of every
    token.

    The chunks are computed again, after ``context`` and the text of :func:`preceding_passage`.
    Where the engine's context has no room for both, the text has what ``context`` leaves, but at
    least half of the room: its beginning and the end of ``context`` are left out. With values V
    before and V' now, the sensitivity of token t is

        u_t = mean over layers l of |V'_lt - V_lt|^2 / mean over tokens s of |V_ls|^2,

    over the middle third of the layers.
    """
    longest = max(len(kv.tokens) for kv in alone)
    room = max(0, engine.context_tokens - longest)
    most = max(room // 2, room - len(context))
    passage = preceding_passage(engine)[-most:] if most else ()
    met = context[: room - len(passage)] + passage
    moved = engine.encode([kv.tokens for kv in alone], context=met)
    return [
        replace(kv, sensitivity=tuple(sensitivity(kv, other).tolist()))
        for kv, other in zip(alone, moved, strict=True)
    ]


def sensitivity(alone: ChunkKV, moved: ChunkKV) -> Tensor:
    """u_t of :func:`measure_sensitivity`, (tokens,), float32."""
    import torch

    total = torch.zeros(len(alone.tokens))
    layers = band("middle", len(alone.values))
    for layer in layers:
        total += relative_change(alone.values[layer], moved.values[layer])
    return total / len(layers)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Of keys or values of one layer, (heads, tokens, head_dim): the squared change of every token,
    relative to the mean square of a token before it; (tokens,), float32."""
    import torch

    before, after = before.float(), after.float()
    size = before.square().sum((0, 2)).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (after - before).square().sum((0, 2)) / size
