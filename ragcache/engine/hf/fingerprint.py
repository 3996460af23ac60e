"""A model's fingerprint: everything its KV depends on, digested."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ragcache.models.file_cache import cached_text
from ragcache.types import Fingerprint

if TYPE_CHECKING:
    from torch import nn

version = version_of("transformers")
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
    """blake3 over every parameter and persistent buffer: name, shape, dtype and bytes, as loaded.

    Other buffers, such as RoPE's frequencies, are made from the configuration.
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
    """The digest of a model, computed once for the files that it is loaded from.

    ``identity`` is :func:`ragcache.models.file_cache.file_identity` of these, before they were
    read; ValueError where it is empty. What loading makes of them (class and dtype) counts too.
    With ``load``, ``model`` is an outline, and the model is loaded where its digest is not known.
    """
    if not identity:
        raise ValueError("the files that the model was loaded from are not known")
    loaded = f"{type(model).__qualname__}|{next(model.parameters()).dtype}|{version}"
    return cached_text(
        "weights",
        [loaded, *identity],
        lambda: weights_digest(model if load is None else load()),
    )


def config_digest(config: Any) -> str:
    """blake3 over the configuration (heads, layers, RoPE, windows, ...), order-free."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _IGNORED}
    return blake3(json.dumps(fields, sort_keys=True, default=_plainly).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """blake3 over the fast tokenizer's whole definition."""
    return blake3(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def adapters_digest(model: Any) -> str:
    """blake3 over the adapters of peft: their names and settings (rank, what they are put on), and
    of each module that they are put on, which are active there, at what scale. Their tensors are
    among the weights. "" without any."""
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
    return blake3(json.dumps(fields, sort_keys=True, default=_plainly).encode()).hexdigest()


def _plainly(value: Any) -> Any:
    """A set in one order in every process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def fingerprint(
    model: Any, tokenizer: Any, name: str, *, codec: str = "raw", weights: str = ""
) -> Fingerprint:
    """Fingerprint of a loaded model. Adapters must be merged, or active, when it is taken.

    ``codec``: how its KV is stored. ``weights``: their digest, where it is known.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    fields = {
        "weights": weights or weights_digest(model),
        "config": config_digest(model.config),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": blake3(str(template).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "codec": codec,
        "adapter": adapters_digest(model),
        "format": FORMAT,
    }
    return Fingerprint(tuple(sorted(fields.items())), name)
