"""Files with texts of documents, questions or answers, readable by their owner only."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISREG
from typing import IO, Literal

__all__ = ["open_private"]

_FLAGS = {
    "wb": os.O_CREAT | os.O_TRUNC,
    "ab": os.O_CREAT | os.O_APPEND,
    "xb": os.O_CREAT | os.O_EXCL,
}


def open_private(path: Path, mode: Literal["wb", "ab", "xb"]) -> IO[bytes]:
    """Open a file for writing with mode 0600, whatever the umask and its mode before.

    The mode of a pipe or a device is left unchanged.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _FLAGS[mode], 0o600)
    if S_ISREG(os.fstat(handle).st_mode):
        os.fchmod(handle, 0o600)
    return open(handle, mode.replace("x", "w"))
