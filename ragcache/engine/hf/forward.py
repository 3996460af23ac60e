"""A forward of the model, whose layers may be driven by callbacks while it lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ragcache.engine.base import AttentionRule, PrefillCallbacks
from ragcache.engine.hf.attention_hook import AttentionOverride, Driven
from ragcache.engine.hf.layer_hooks import Layers
from ragcache.engine.hf.prompt_cache import PlacedKV
from ragcache.util.buffer_pool import BufferPool


@dataclass(frozen=True, slots=True)
class Forward:
    """What forwards of one model have in common."""

    model: Any
    layers: Layers
    pool: BufferPool

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.model.get_decoder().config

    def cache(self, rows: int) -> PlacedKV:
        """Empty KV with room for ``rows``."""
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
        """While this lasts, ``model(**arguments)``, with what is yielded, goes on after the rows of
        ``kv`` with ``tokens`` at ``positions``. Its logits are (1, 1, vocabulary), of the last row.

        ``callbacks`` drive the layers; None: the model computes every row by itself. Of a forward
        that is driven, ``attend`` sees the attention, or else ``override`` computes it, and layers
        from ``until`` on are not computed: the forward raises StopForward there.
        """
        kv.begin(len(tokens))
        ids = torch.tensor([tokens], device=self.model.device)
        with ExitStack() as stack:
            if callbacks is not None:
                selected = self.layers.kernels.attention
                override = override or Driven(attend, self.config, kv.start, selected)
                stack.enter_context(override.taken())
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
