"""Load models of sentence-transformers: from safetensors, without code of their own, and whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ragcache.errors import ModelError
from ragcache.models.file_cache import cached_text
from ragcache.models.memory import copy_to_memory, ensure_unchanged
from ragcache.models.silence import silence_transformers
from ragcache.retriever.embedder_files import model_digest, model_files

if TYPE_CHECKING:
    from torch import nn

_Model = TypeVar("_Model", bound="nn.Module")


def load_model(
    kind: Callable[..., _Model],
    what: str,
    name: str,
    folder: Path,
    device: str | None,
    *,
    instead: str,
    unused: str | None = None,
) -> tuple[_Model, str]:
    """A model of class ``kind``, in memory of its own, and the digest of its files.

    ``what`` and ``instead`` are for errors: what kind of model it is, and what else could be named.
    ``unused``: the prefix of tensors that may be missing, because such a model never uses them.
    Raises ModelError if it cannot be loaded, lacks tensors, or changes while it is read.
    """
    with ensure_unchanged(folder, model_files(folder)):
        digest = model_digest(folder)
        versions = [f"{of} {version(of)}" for of in ("sentence-transformers", "transformers")]
        try:
            with silence_transformers():
                model = kind(
                    str(folder),
                    device=device,
                    trust_remote_code=False,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                )
                missing = cached_text(
                    what, [digest, *versions], lambda: "\n".join(_missing(model, unused))
                )
        # The libraries raise errors of any class for damaged or foreign models and for devices.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"The {what} {name} cannot be loaded: {reason} Check the name or folder and the "
                f"device; without access to a model hub use {instead}."
            ) from error
        if missing:
            first, *others = missing.splitlines()
            raise ModelError(
                f"The {what} {name} lacks {1 + len(others)} of its tensors, {first} for one: they "
                "would be random numbers. Name another model, or get the model's files anew."
            )
        copy_to_memory(model)
    return model, digest


def _missing(model: nn.Module, unused: str | None) -> Iterator[str]:
    """Names of tensors that the files lack and that results depend on."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.name_or_path:
            loaded: Any = type(part).from_pretrained(
                part.name_or_path,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            _, found = loaded
            names = {*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])}
            yield from sorted(
                name for name in names if unused is None or not name.startswith(unused)
            )
            break  # its submodules were loaded with it
