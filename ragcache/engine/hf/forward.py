"""Run one forward of the model, with or without callbacks that drive its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ragcache.engine.base import AttentionRule, PrefillCallbacks
from ragcache.engine.hf.attention_hook import AttentionOverride, PartialForward
from ragcache.engine.hf.layer_hooks import DecoderLayers
from ragcache.engine.hf.prompt_cache import PlacedKV
from ragcache.engine.kernels.row_attention import without_cudnn
from ragcache.util.buffer_pool import BufferPool


@dataclass(frozen=True, slots=True)
class Forward:
    """What all forwards of one model share. ``pool`` holds the memory of their KV."""

    model: Any
    layers: DecoderLayers
    pool: BufferPool

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.model.get_decoder().config

    def cache(self, rows: int) -> PlacedKV:
        """An empty cache with room for ``rows`` rows."""
        return PlacedKV(len(self.layers.modules), rows, self.pool)

    @contextmanager
    def driven(
        self,
        kv: PlacedKV,
        tokens: Sequence[int],
        positions: Sequence[int],
        callbacks: PrefillCallbacks | None = None,
        *,
        attend: AttentionRule | None = None,
        override: AttentionOverride | None = None,
        until: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Prepare a forward over ``tokens`` at ``positions`` that continues ``kv``.

        Yields the arguments of ``model(**arguments)``, whose logits are (1, 1, vocabulary), of the
        last row. Without ``callbacks`` and ``attend``, the model computes every row and the other
        options have no effect. ``override`` computes the attention; by default the model does, and
        ``attend`` observes it. The forward raises StopForward before layer ``until``.
        """
        if callbacks is None and attend is not None:
            callbacks = PrefillCallbacks()
        kv.begin(len(tokens))
        ids = torch.tensor([tokens], device=self.model.device)
        with ExitStack() as stack:
            stack.enter_context(without_cudnn())
            if callbacks is not None:
                selected = self.layers.kernels.attention
                override = override or PartialForward(attend, self.config, kv.start, selected)
                stack.enter_context(override.installed())
                stack.enter_context(
                    self.layers.hooked(kv, callbacks, len(tokens), override, until=until)
                )
            yield {
                "input_ids": ids,
                "past_key_values": kv,
                "position_ids": torch.tensor([positions], device=ids.device),
                "use_cache": True,
                "logits_to_keep": 1,
            }
