"""The small model that ships, and how model names are read."""

from __future__ import annotations

from pathlib import Path

TINY = "tiny"
_HERE = Path(__file__).parent


def model_path(name: str) -> str:
    """``tiny`` is the folder that ships with the package; any other name stays as it is."""
    return str(_HERE / TINY) if name == TINY else name


def world(name: str) -> Path:
    """A file of the small model's world: ``prompts.jsonl``, ``documents.jsonl``, ..."""
    return _HERE / TINY / "world" / name
