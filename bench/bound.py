"""The lower bound of a fused prefill's time: max(bytes / bandwidth, FLOPs / rate)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ragcache.blend.fuse import FusedPrompt
from ragcache.engine.hf.engine import TransformersEngine


@dataclass(frozen=True)
class Cost:
    """The FLOPs of a row in one layer of a model."""

    layer: int  # all products with weights
    kv: int  # of these, those that make keys and values
    key: int  # attention, for every key that the row sees

    @classmethod
    def of(cls, engine: TransformersEngine) -> Cost:
        layer = engine.model.get_decoder().layers[0]
        linear = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        sizes = {name: 2 * module.weight.numel() for name, module in linear.items()}
        kv = sum(n for name, n in sizes.items() if name.endswith(("k_proj", "v_proj")))
        return cls(sum(sizes.values()), kv, 4 * engine.heads * engine.spec.head_dim)

    def full(self, rows: int, layers: int) -> int:
        """Every row sees itself and those before it."""
        return layers * (rows * self.layer + rows * (rows + 1) // 2 * self.key)

    def fused(self, done: FusedPrompt) -> int:
        """What was computed. Where a layer narrows, keys and values of all rows, and the rest of
        those that go on; of a probe, the question's rows over all keys."""
        fresh, total = done.layout.fresh, 0
        for layer, trace in enumerate(done.layers):
            narrows = trace.through < trace.rows
            through = done.chosen[layer + narrows]
            total += self.kv * (trace.rows - trace.through) + self.layer * trace.through
            total += self.key * (_seen(fresh) + _seen(through))
        probed = done.probed // max(1, len(fresh))  # layers
        return total + probed * (len(fresh) * self.layer + self.key * _seen(fresh))


def _seen(rows: Tensor) -> int:
    """Keys that rows see together."""
    return int((rows + 1).sum())
