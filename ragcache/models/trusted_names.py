"""The models that this user has named, which may be loaded because a store names them.

A store records the model and the embedder that it was built with, so that they need not be named
again. But a store can come from an untrusted source. So a recorded model is loaded only if the user
has named it before, on this machine, or if it ships with ragcache.

The names are in ``$XDG_STATE_HOME/ragcache/named`` (``~/.local/state/ragcache/named``), a JSON
string per line. If that file cannot be written, models must be named every time.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from ragcache.models import is_packaged
from ragcache.models.file_cache import user_folder

__all__ = ["absolute_name", "is_trusted", "remember_name"]


def absolute_name(name: str) -> str:
    """A name that does not depend on the working directory: folders and files by their absolute
    path."""
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if not is_packaged(name) and os.path.exists(path) else name


def remember_name(name: str) -> None:
    """Remember that the user has named this model, if the file can be written."""
    name = absolute_name(name)
    if not name or name in _names():
        return
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _file().open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(name) + "\n")


def is_trusted(name: str) -> bool:
    """Whether the user has named this model before."""
    return absolute_name(name) in _names()


def _names() -> set[str]:
    names = set()
    with suppress(OSError, UnicodeDecodeError):
        for line in _file().read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a truncated line
                names.add(json.loads(line))
    return {name for name in names if isinstance(name, str)}


def _file() -> Path:
    return user_folder("XDG_STATE_HOME", ".local", "state") / "named"
