"""A loaded model apart from its files: what happens to them later is not its business."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.errors import ModelError
from ragcache.models.file_cache import file_identity

if TYPE_CHECKING:
    from torch import nn


def copy_to_memory(model: nn.Module) -> None:
    """Give every tensor on the CPU memory of its own.

    Safetensors are mapped: a file that is written over in place would change the model that is
    running, under the fingerprint of the one before, and one that is cut off would end the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cpu:
            tensor.data = tensor.data.clone()


@contextmanager
def ensure_unchanged(folder: Path, files: Sequence[Path]) -> Iterator[list[str]]:
    """The identity of the files that a model is loaded from within.

    Raises ModelError where they are others at the end, for then nobody knows what was loaded.
    """
    identity = file_identity(files)
    yield identity
    try:
        same = file_identity(files) == identity
    except OSError:
        same = False
    if not same:
        raise ModelError(
            f"the files in {folder} were changed while they were read. Wait until they are all "
            "there, and start again."
        )
