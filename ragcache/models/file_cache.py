"""What was found out once about files, and is kept for the next process.

Kept below ``$XDG_CACHE_HOME/ragcache`` (``~/.cache``). A cache that cannot be read or written is
done without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from ragcache.text import encode_text


def file_identity(files: Iterable[Path]) -> list[str]:
    """What changes when one of ``files`` does: path, inode, size, times of change.

    Links are followed. Raises ValueError where there are none, for nothing can be known by that,
    and OSError where one is not there.
    """
    found = []
    for file in sorted({file.resolve(strict=True) for file in files}):
        stat = file.stat()
        times = f"{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        found.append(f"{file}|{stat.st_ino}|{stat.st_size}|{times}")
    if not found:
        raise ValueError("there are no files, and so nothing that their content could be known by")
    return found


def user_folder(variable: str, *below: str) -> Path:
    """ragcache's folder where ``variable`` says, else below the user's home. One that cannot be
    made where the user has none, as in some containers."""
    home = os.path.expanduser("~")
    base = Path(home if os.path.isabs(home) else os.devnull, *below)
    return Path(os.environ.get(variable) or base) / "ragcache"


def cached_text(kind: str, identity: Sequence[str], make: Callable[[], str]) -> str:
    """What ``make`` gives for ``identity``, made once: it must say all that the result depends on.

    A kept text that was damaged is made anew. Raises ValueError where part of the identity is
    missing, and what ``make`` raises; then nothing is kept.
    """
    if not identity or not all(identity):
        raise ValueError(f"part of what names this {kind} is missing: {list(identity)}")
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    file = folder / f"{kind}-{_digest(chr(10).join(identity))}"
    with suppress(OSError, UnicodeDecodeError):
        checksum, _, known = file.read_text(encoding="utf-8").partition("\n")
        if checksum == _digest(known):
            return known
    made = make()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(f"{_digest(made)}\n{made}", encoding="utf-8")
        part.replace(file)
    return made


def content_digest(folder: Path, files: Iterable[Path]) -> str:
    """blake3 over the files' paths below ``folder`` and their bytes, read once for these files.

    It stays the same where the folder is moved or copied.
    """
    files = sorted(files)

    def read() -> str:
        h = blake3(max_threads=blake3.AUTO)
        for file in files:
            name = file.relative_to(folder).as_posix()
            h.update(f"{len(name)}|{name}|{file.stat().st_size}|".encode())
            h.update_mmap(file)
        return h.hexdigest()

    return cached_text("content", [str(folder.resolve()), *file_identity(files)], read)


def _digest(text: str) -> str:
    return blake3(encode_text(text)).hexdigest()
