"""A cache of texts computed from files, shared by processes of one user.

It is in ``$XDG_CACHE_HOME/ragcache`` (``~/.cache/ragcache``). If it cannot be read or written,
everything is computed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from ragcache.text import encode_text

__all__ = ["cached_text", "content_digest", "user_folder"]


def file_identity(files: Iterable[Path]) -> list[str]:
    """Path, inode, size and change times of each of ``files``, which change when a file does.

    Links are resolved. Raises ValueError without files, which would identify nothing, and OSError
    for a missing file.
    """
    found = []
    for file in sorted({file.resolve(strict=True) for file in files}):
        stat = file.stat()
        times = f"{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        found.append(f"{file}|{stat.st_ino}|{stat.st_size}|{times}")
    if not found:
        raise ValueError("no files are given: their content cannot be identified")
    return found


def user_folder(variable: str, *below: str) -> Path:
    """ragcache's folder in ``$variable`` if that is set, else in ``below`` of the user's home.

    Without a home, as in some containers, it is a path that cannot be created.
    """
    home = os.path.expanduser("~")
    base = Path(home if os.path.isabs(home) else os.devnull, *below)
    return Path(os.environ.get(variable) or base) / "ragcache"


def cached_text(kind: str, identity: Sequence[str], make: Callable[[], str]) -> str:
    """The result of ``make``, computed once for each ``kind`` and ``identity``.

    ``identity`` must contain everything that the result depends on. A damaged entry is computed
    again. Raises ValueError if a part of the identity is empty, and what ``make`` raises, which is
    not cached.
    """
    if not identity or not all(identity):
        raise ValueError(f"part of the identity of this {kind} is empty: {list(identity)}")
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
    """BLAKE3 digest (hex) of the files' paths relative to ``folder`` and their bytes.

    It does not change if the folder is moved or copied. Unchanged files are read only once.
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
