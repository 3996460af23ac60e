"""Model files: how models are named and found, checked, cached and trusted.

``hub`` finds a model's folder, ``checkpoint`` checks its files, ``memory`` separates a loaded model
from them, ``file_cache`` caches what was computed from files, ``trusted_names`` remembers which
models the user has named, and ``silence`` mutes transformers' output.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["TINY", "model_path", "world_file"]

TINY = "tiny"
_HERE = Path(__file__).parent


def model_path(name: str) -> str:
    """The path or hub name that a model's name stands for.

    ``tiny`` is the folder that ships with the package, and a leading ``~`` is the user's home;
    other names are returned unchanged.
    """
    if name == TINY:
        return str(_HERE / TINY)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def world_file(name: str) -> Path:
    """A file of the small model's data set: ``prompts.jsonl``, ``documents.jsonl``, ..."""
    return _HERE / TINY / "world" / name
