"""What holds for every forward: of a prompt, of chunks, of a probe and of each decoded token."""

from __future__ import annotations

import torch

from ragcache.engine.base import PrefillCallbacks
from ragcache.types import Sampling
from tests import models

IDS = tuple(range(3, 23))


def test_no_forward_uses_cudnn() -> None:
    """It would build a plan for every new length."""
    engine, seen = models.engine("llama"), list[bool]()

    def look(*_: object) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]

    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    handle = engine.model.register_forward_pre_hook(look)
    try:
        engine.encode([IDS, IDS[:7]], context=IDS[:3])
        prefilled = engine.prefill(IDS, room=4)
        engine.prefill(IDS, PrefillCallbacks())
        tokens = [step.token for step in engine.decode(prefilled, Sampling(max_tokens=4))]
        engine.continuation_logits(prefilled, tuple(tokens[:2]))
    finally:
        handle.remove()
    assert before and len(seen) >= 7 and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before  # type: ignore[no-untyped-call]
