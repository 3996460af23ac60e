"""Files that hold texts of documents, questions or answers: for their owner only."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISREG
from typing import IO, Literal

_FLAGS = {
    "wb": os.O_CREAT | os.O_TRUNC,
    "ab": os.O_CREAT | os.O_APPEND,
    "xb": os.O_CREAT | os.O_EXCL,
}


def open_private(path: Path, mode: Literal["wb", "ab", "xb"]) -> IO[bytes]:
    """Open a file to write to it: 0600, whatever the umask, and whatever it was before. A pipe or a
    device, which is somebody else's, is written to as it is."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _FLAGS[mode], 0o600)
    if S_ISREG(os.fstat(handle).st_mode):
        os.fchmod(handle, 0o600)
    return open(handle, mode.replace("x", "w"))
