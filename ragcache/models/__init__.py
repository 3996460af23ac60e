"""Models before they are loaded: what names them, which files they are, what is known of those."""

from __future__ import annotations

from pathlib import Path

TINY = "tiny"
_HERE = Path(__file__).parent


def model_path(name: str) -> str:
    """``tiny`` is the folder that ships with the package, ``~`` the user's home; any other name
    stays as it is."""
    if name == TINY:
        return str(_HERE / TINY)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def world_file(name: str) -> Path:
    """A file of the small model's world: ``prompts.jsonl``, ``documents.jsonl``, ..."""
    return _HERE / TINY / "world" / name
