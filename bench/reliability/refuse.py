"""Make system calls fail with an error for the rest of a process's life, by seccomp.

Any caller, in LMDB's C code or in Python, gets the error as from a failing disk, and the call has
no effect. Works on Linux on x86-64 and ARM64, without privileges.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_NUMBERS = {
    "x86_64": {
        **{"write": 1, "open": 2, "pread64": 17, "pwrite64": 18, "fsync": 74, "fdatasync": 75},
        **{"truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87},
        **{"openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "fallocate": 285},
        **{"preadv": 295, "pwritev": 296, "renameat2": 316, "preadv2": 327, "pwritev2": 328},
    },
    "aarch64": {
        **{"write": 64, "pread64": 67, "pwrite64": 68, "fsync": 82, "fdatasync": 83},
        **{"truncate": 45, "ftruncate": 46, "openat": 56, "mkdirat": 34, "unlinkat": 35},
        **{"renameat": 38, "fallocate": 47, "preadv": 69, "pwritev": 70, "renameat2": 276},
        **{"preadv2": 286, "pwritev2": 287},
    },
}
_LOAD, _EQUAL, _BITS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: always, or only where its argument ``at`` is as ``when`` says."""

    name: str
    when: Literal["", "has bits", "is not", "is below"] = ""
    at: int = 0
    value: int = 0


def possible() -> bool:
    return os.uname().sysname == "Linux" and platform.machine() in _NUMBERS


def refuse(calls: Sequence[Call], error: int) -> None:
    """From now on these fail with ``errno`` error, in all threads that are started from here."""
    numbers = _NUMBERS[platform.machine()]
    code = b"".join(_block(numbers[c.name], c, error) for c in calls if c.name in numbers)
    code += _instruction(_RETURN, 0, 0, _ALLOW)
    filled = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(filled))
    libc = ctypes.CDLL(None, use_errno=True)
    pointer = ctypes.create_string_buffer(program, len(program))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, pointer):
        raise OSError(ctypes.get_errno(), "seccomp is not to be had")


def _block(number: int, call: Call, error: int) -> bytes:
    """Load the number; on a match compare the argument; return the error, or continue after it."""
    refused = _instruction(_RETURN, 0, 0, _ERROR | error)
    load = _instruction(_LOAD, 0, 0, 0)
    if not call.when:
        return load + _instruction(_EQUAL, 0, 1, number) + refused
    test, met, unmet = {
        "has bits": (_BITS, 0, 1),
        "is not": (_EQUAL, 1, 0),
        "is below": (_AT_LEAST, 1, 0),
    }[call.when]
    argument = _instruction(_LOAD, 0, 0, 16 + 8 * call.at)
    looked = argument + _instruction(test, met, unmet, call.value)
    return load + _instruction(_EQUAL, 0, 3, number) + looked + refused


def _instruction(code: int, met: int, unmet: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, met, unmet, value)
