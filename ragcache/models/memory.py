"""Make a loaded model independent of its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.errors import ModelError
from ragcache.models.file_cache import file_identity

if TYPE_CHECKING:
    from torch import nn

__all__ = ["copy_to_memory", "ensure_unchanged"]


def copy_to_memory(model: nn.Module) -> None:
    """Copy every tensor on the CPU into memory of its own.

    Safetensors are memory-mapped: overwriting a file in place would change the running model
    without changing its fingerprint, and truncating it would crash the process (SIGBUS).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cpu:
            tensor.data = tensor.data.clone()


@contextmanager
def ensure_unchanged(folder: Path, files: Sequence[Path]) -> Iterator[list[str]]:
    """Yield the identity of ``files``, from which a model is loaded in the ``with`` block.

    Raises ModelError if they have changed at its end: then it is unknown what was loaded.
    """
    identity = file_identity(files)
    yield identity
    try:
        same = file_identity(files) == identity
    except OSError:
        same = False
    if not same:
        raise ModelError(
            f"the files in {folder} were changed while they were read. Wait until all of them are "
            "written, and start again."
        )
