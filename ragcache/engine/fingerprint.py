"""A model's fingerprint: everything its KV depends on, digested."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

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
    """blake3 over every parameter and buffer: name, shape, dtype and bytes, as loaded."""
    import torch

    h = blake3(max_threads=blake3.AUTO)
    for name, tensor in sorted(model.state_dict().items()):
        h.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        h.update(memoryview(raw.numpy()))
    return h.hexdigest()


def cached_weights_digest(
    model: nn.Module, files: Sequence[Path], load: Callable[[], nn.Module] | None = None
) -> str:
    """The digest of a model that was just loaded from ``files``, computed once for these files.
    With ``load``, ``model`` is its outline, and it is loaded where its digest is not known.

    Kept below ``$XDG_CACHE_HOME/ragcache`` (``~/.cache``) under the files' identity (path, inode,
    size, time of change) and what loading made of them (class and dtype): a file that was changed
    in place with all of these restored would go unnoticed. A cache that cannot be written is done
    without.
    """
    identity = [f"{type(model).__qualname__}|{next(model.parameters()).dtype}|{version}"]
    for file in sorted(files):
        stat = file.stat()
        identity.append(f"{file.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ragcache"
    kept = folder / f"weights-{blake3(chr(10).join(identity).encode()).hexdigest()}"
    with suppress(OSError):
        known = kept.read_text().strip()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    digest = weights_digest(model if load is None else load())
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.{os.getpid()}")
        part.write_text(digest)
        part.replace(kept)
    return digest


def config_digest(config: Any) -> str:
    """blake3 over the configuration (heads, layers, RoPE, windows, ...), order-free."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _IGNORED}
    return blake3(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """blake3 over the fast tokenizer's whole definition."""
    return blake3(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def fingerprint(
    model: Any, tokenizer: Any, name: str, *, codec: str = "raw", weights: str = ""
) -> Fingerprint:
    """Fingerprint of a loaded model. Adapters must be merged, or active, when it is taken.

    ``codec``: how its KV is stored. ``weights``: their digest, where it is known.
    """
    adapters = sorted(getattr(model, "peft_config", None) or {})
    template = getattr(tokenizer, "chat_template", None) or ""
    fields = {
        "weights": weights or weights_digest(model),
        "config": config_digest(model.config),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": blake3(str(template).encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "codec": codec,
        "adapter": ",".join(adapters),
        "format": FORMAT,
    }
    return Fingerprint(tuple(sorted(fields.items())), name)
