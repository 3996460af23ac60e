"""Compute a model's fingerprint: digests of everything that its KV depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ragcache.models.file_cache import cached_text
from ragcache.types import Fingerprint

if TYPE_CHECKING:
    from torch import nn

_TRANSFORMERS = version("transformers")
_FORMAT = "1"  # increased when the meaning of stored KV changes

#: Entries of the configuration that do not affect the KV.
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
    """blake3 over name, shape, dtype and bytes of every parameter and persistent buffer, in hex.

    Other buffers, such as RoPE's frequencies, follow from the configuration.
    """
    import torch

    h = blake3(max_threads=blake3.AUTO)
    for name, tensor in sorted(model.state_dict().items()):
        h.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        h.update(memoryview(raw.numpy()))
    return h.hexdigest()


def cached_weights_digest(
    model: nn.Module, identity: Sequence[str], load: Callable[[], nn.Module] | None = None
) -> str:
    """:func:`weights_digest`, cached on disk by the files, class and dtype of the model.

    ``identity`` is the :func:`ragcache.models.file_cache.file_identity` of the files, taken before
    they were read. With ``load``, ``model`` has no weights, and ``load`` loads the model if its
    digest is not in the cache. Raises ValueError if ``identity`` is empty.
    """
    if not identity:
        raise ValueError("the files that the model was loaded from are not known")
    loaded = f"{type(model).__qualname__}|{next(model.parameters()).dtype}|{_TRANSFORMERS}"
    return cached_text(
        "weights",
        [loaded, *identity],
        lambda: weights_digest(model if load is None else load()),
    )


def _config_digest(config: Any) -> str:
    """blake3 over the configuration (heads, layers, RoPE, windows, ...), independent of order."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _IGNORED}
    return blake3(json.dumps(fields, sort_keys=True, default=_to_json).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    """blake3 over the fast tokenizer's whole definition."""
    return blake3(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _adapters_digest(model: Any) -> str:
    """blake3 over PEFT adapters: names, settings such as rank and target modules, and, for each
    target module, which adapters are active at which scale. Their tensors are part of the weights.
    "" without adapters."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return ""
    fields = {
        "active": getattr(model, "active_adapter", None),
        "adapters": {name: config.to_dict() for name, config in adapters.items()},
        "modules": {
            name: [
                module.active_adapters,
                module.disable_adapters,
                module.merged_adapters,
                getattr(module, "scaling", {}),
            ]
            for name, module in model.named_modules()
            if hasattr(module, "merged_adapters")
        },
    }
    return blake3(json.dumps(fields, sort_keys=True, default=_to_json).encode()).hexdigest()


def _to_json(value: Any) -> Any:
    """A value as JSON; sets in the same order in every process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def fingerprint(
    model: Any, tokenizer: Any, name: str, *, codec: str = "raw", weights: str = ""
) -> Fingerprint:
    """Fingerprint of a loaded model, with its adapters in their current state.

    ``codec``: how its KV is stored. ``weights``: their digest; "" to compute it.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    fields = {
        "weights": weights or weights_digest(model),
        "config": _config_digest(model.config),
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": blake3(str(template).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "codec": codec,
        "adapter": _adapters_digest(model),
        "format": _FORMAT,
    }
    return Fingerprint(tuple(sorted(fields.items())), name)
