"""How much a model's predictions depend on the keys and on the values of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ragcache.types import Tokens

__all__ = ["kv_importance"]


def kv_importance(model: Any, texts: Sequence[Tokens]) -> list[tuple[float, float]]:
    """Per layer, the mean square of the derivative of log p by a number of its keys, and of its
    values.

    p is the probability of tokens that are drawn from the model's own predictions at every place of
    a text, so this is the mean diagonal of the Fisher information: to second order, an independent
    error of variance v in each number changes the predictions by v / 2 times it, in nats (KL) for
    each number. RoPE, a rotation, does not change it. The model must be differentiable.
    """
    generator = torch.Generator().manual_seed(0)
    squares: list[Tensor] = []
    frozen = {weight: weight.requires_grad for weight in model.parameters()}
    try:
        for weight in frozen:
            weight.requires_grad_(False)
        for text in texts:
            found = _squares(model, text, generator)
            squares = found if not squares else [a + b for a, b in zip(squares, found, strict=True)]
    finally:
        for weight, needed in frozen.items():
            weight.requires_grad_(needed)
    pairs = torch.stack(squares).view(-1, 2) / len(texts)
    return [(float(keys), float(values)) for keys, values in pairs]


def _squares(model: Any, text: Tokens, generator: torch.Generator) -> list[Tensor]:
    """Mean squared derivatives by keys, values, keys, ... of one text."""
    with torch.inference_mode(False), torch.enable_grad():
        ids = torch.tensor([text], device=model.device)
        inputs = model.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
        cache = _Recording()
        logits = model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).logits
        chances = logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator)
        chances.gather(-1, drawn.to(chances.device)).sum().backward()
        planes = [plane for pair in cache.pairs for plane in pair]
        return [
            torch.zeros(()) if plane.grad is None else plane.grad.float().square().mean().cpu()
            for plane in planes
        ]


class _Recording(DynamicCache):
    """Keeps the keys and values of every layer, with their derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        key_states.retain_grad()
        value_states.retain_grad()
        self.pairs.append((key_states, value_states))
        return key_states, value_states
