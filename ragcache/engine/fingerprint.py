"""A model's fingerprint: everything its KV depends on, digested."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ragcache.types import Fingerprint

if TYPE_CHECKING:
    from torch import nn

FORMAT = "1"  # raised when the meaning of stored KV changes

#: Config entries that do not touch the KV.
_IGNORED = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation_autoset",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


def weights_digest(model: nn.Module) -> str:
    """blake3 over every parameter and buffer: name, shape, dtype and bytes, as loaded."""
    import torch

    h = blake3(max_threads=blake3.AUTO)
    for name, tensor in sorted(model.state_dict().items()):
        h.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        h.update(memoryview(raw.numpy()))
    return h.hexdigest()


def config_digest(config: Any) -> str:
    """blake3 over the configuration (heads, layers, RoPE, windows, ...), order-free."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _IGNORED}
    return blake3(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """blake3 over the fast tokenizer's whole definition."""
    return blake3(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def fingerprint(model: Any, tokenizer: Any, name: str, *, codec: str = "raw") -> Fingerprint:
    """Fingerprint of a loaded model. Adapters must be merged, or active, when it is taken."""
    adapters = sorted(getattr(model, "peft_config", None) or {})
    template = getattr(tokenizer, "chat_template", None) or ""
    fields = {
        "weights": weights_digest(model),
        "config": config_digest(model.config),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": blake3(str(template).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "codec": codec,
        "adapter": ",".join(adapters),
        "format": FORMAT,
    }
    return Fingerprint(tuple(sorted(fields.items())), name)
