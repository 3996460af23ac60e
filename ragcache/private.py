"""Files that hold texts of documents, questions or answers: for their owner only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Literal

_FLAGS = {
    "wb": os.O_CREAT | os.O_TRUNC,
    "ab": os.O_CREAT | os.O_APPEND,
    "xb": os.O_CREAT | os.O_EXCL,
}


def private(path: Path, mode: Literal["wb", "ab", "xb"]) -> IO[bytes]:
    """Open a file to write to it. One that is made is 0600, whatever the umask; one that is there
    keeps the permissions that its owner gave it."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _FLAGS[mode], 0o600)
    return open(handle, mode.replace("x", "w"))
