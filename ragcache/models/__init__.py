"""Model files: how models are named and found, checked, cached and trusted.

``packaged`` has the names of models that come as packages, ``hub`` finds a model's folder, ``gguf``
converts a GGUF file into one, ``checkpoint`` checks its files, ``memory`` separates a loaded model
from them, ``file_cache`` caches what was computed from files, ``trusted_names`` remembers which
models the user has named, and ``silence`` mutes transformers' output.
"""

from __future__ import annotations

import os
from pathlib import Path

from ragcache.models.packaged import SMOLLM2, TINY, is_packaged, packaged_path

__all__ = ["ARTICLES", "SMOLLM2", "TINY", "is_packaged", "model_path", "world_file"]

ARTICLES = Path(__file__).parent / "articles"  #: A folder of Markdown files: text that ships.


def model_path(name: str) -> str:
    """The path or hub name that a model's name stands for.

    ``tiny`` and ``smollm2`` are models in installed packages, and a leading ``~`` is the user's
    home; other names are returned unchanged. Raises ModelError if the package of ``smollm2`` is not
    installed, or holds another file.
    """
    if is_packaged(name):
        return str(packaged_path(name))
    return os.path.expanduser(name)


def world_file(name: str) -> Path:
    """A file of the small model's data set: ``prompts.jsonl``, ``documents.jsonl``, ..."""
    return packaged_path(TINY) / "world" / name
