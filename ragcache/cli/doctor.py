"""Checks of a store and of the machine it is on, for `ragcache doctor`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ragcache.cli.render import size
from ragcache.setup import PROMPT_DATE
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.chunk_files import PAGE
from ragcache.store.disk.store import DiskStore
from ragcache.util.private_file import open_private

if TYPE_CHECKING:
    from ragcache.engine.base import Engine

State = Literal["good", "look", "bad"]
_PROBE_BYTES = 64 << 20
_LEAST_READAHEAD = 128 << 10  # bytes: cold reads of LMDB are several times slower with less
_FAISS = "faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu"
_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "fuse.sshfs",
    "lustre",
    "ceph",
    "glusterfs",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``detail`` says what was found and, unless good, what to do."""

    what: str
    state: State
    detail: str


def inspect_store(store: DiskStore, engine: Engine | None = None) -> Iterator[Finding]:
    """Check a store, its disk, and how much of it ``engine`` can use. It writes a file of 64 MiB
    to measure the disk, unless another process writes the store."""
    path = store.tables.path
    yield _file_system(path)
    yield _readahead(path)
    yield _space(store)
    if store.refusal() is None:
        yield _speed(path)
    yield _strays(store)
    yield _map(store)
    yield _unused(store)
    yield _readers(store)
    if engine is not None:
        yield _fingerprints(store, engine)
        if engine.template.day is not None:
            kept = Catalog(store).get_setting(PROMPT_DATE)
            yield Finding("prompt date", "good", f"{kept or 'none yet'}: kept, so KV stays usable")
        yield Finding("kernels", "good", engine.kernels)
    yield _faiss()


def _file_system(path: Path) -> Finding:
    kind = _mount(path)
    if kind in _NETWORK:
        return Finding(
            "file system", "bad", f"{kind}: LMDB needs a local disk; move the store to one"
        )
    return Finding("file system", "good", kind or "unknown")


def _mount(path: Path) -> str:
    """The type of the file system that holds ``path``; "" if the system does not tell."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    within = [(m[1], m[2]) for m in mounts if path.is_relative_to(m[1].replace("\\040", " "))]
    return max(within, key=lambda mount: len(mount[0]))[1] if within else ""


def _readahead(path: Path) -> Finding:
    device = os.stat(path).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for folder in (block, block.resolve().parent):
        try:
            bytes_ahead = int((folder / "queue" / "read_ahead_kb").read_text()) << 10
        except (OSError, ValueError):
            continue
        if bytes_ahead < _LEAST_READAHEAD:
            fix = (
                f"blockdev --setra {_LEAST_READAHEAD // 512} on its device makes cold reads faster"
            )
            return Finding("readahead", "look", f"{size(bytes_ahead)}: {fix}")
        return Finding("readahead", "good", size(bytes_ahead))
    return Finding("readahead", "good", "no block device of its own")


def _space(store: DiskStore) -> Finding:
    free = shutil.disk_usage(store.tables.path).free
    held = store.stats().payload_bytes
    detail = f"{size(free)} free, {size(held)} of KV held"
    if free < max(1 << 30, store.tables.live_bytes()):
        return Finding("free space", "look", f"{detail}: a compaction needs room for a copy")
    return Finding("free space", "good", detail)


def _speed(path: Path) -> Finding:
    """Speed of sequential writes with fsync, and of reading back, if possible without the page
    cache."""
    file = path / "writer.probe"
    data = os.urandom(1 << 20)
    try:
        file.unlink(missing_ok=True)
        began = time.perf_counter()
        with open_private(file, "xb") as out:
            for _ in range(_PROBE_BYTES >> 20):
                out.write(data)
            os.fsync(out.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        wrote = time.perf_counter() - began
        began = time.perf_counter()
        with file.open("rb", buffering=0) as back:
            while back.read(PAGE << 8):
                pass
        read = time.perf_counter() - began
    except OSError as error:
        return Finding("disk speed", "bad", f"cannot write {size(_PROBE_BYTES)}: {error}")
    finally:
        file.unlink(missing_ok=True)
    rates = f"{size(int(_PROBE_BYTES / wrote))}/s written, {size(int(_PROBE_BYTES / read))}/s read"
    return Finding("disk speed", "good", rates)


def _strays(store: DiskStore) -> Finding:
    strays = store.strays()
    if strays:
        return Finding(
            "strays",
            "look",
            f"{len(strays)} files in {store.tables.path / 'kv'} do not belong to the store, such "
            f"as {strays[0]}: they are not used, and may be removed",
        )
    return Finding("strays", "good", "no other files among those of chunks")


def _map(store: DiskStore) -> Finding:
    used, most = store.tables.file.stat().st_size, store.tables.map_size
    detail = f"{size(used)} of at most {size(most)}"
    if used > most * 0.8:
        return Finding("LMDB map", "look", f"{detail}: compact, or open it with a larger map_size")
    return Finding("LMDB map", "good", detail)


def _unused(store: DiskStore) -> Finding:
    held, live = store.tables.file.stat().st_size, store.tables.live_bytes()
    detail = f"{size(max(0, held - live))} of {size(held)} in LMDB's file"
    if store.is_wasteful():
        return Finding("unused", "look", f"{detail}: `ragcache compact` frees it")
    return Finding("unused", "good", detail)


def _readers(store: DiskStore) -> Finding:
    long = store.tables.long_readers()
    if long:
        who = "; ".join(f"{reader} for {seconds:.0f} s" for reader, seconds in long.items())
        return Finding(
            "readers", "look", f"{who} (pid, thread, number): while they read, the file grows"
        )
    return Finding("readers", "good", "none that keep deleted data from being freed")


def _fingerprints(store: DiskStore, engine: Engine) -> Finding:
    stats = store.stats()
    usable, total = stats.usable(engine.fingerprint)
    detail = f"{engine.fingerprint} can use {usable} of {total} chunks"
    if total and not usable:
        built = ", ".join(stats.fingerprints)
        return Finding("model", "bad", f"{detail}: they are for {built}; open it with that model")
    return Finding("model", "good", detail)


def _faiss() -> Finding:
    """Which FAISS is installed. The distributions for CPUs and for GPUs have the same files."""
    import faiss
    import torch

    there = [f"{name} {version}" for name in _FAISS if (version := _installed(name)) is not None]
    if len(there) > 1:
        names = " and ".join(there)
        return Finding(
            "faiss",
            "look",
            f"{names} are installed, which overwrite each other's files: pip uninstall -y "
            f"{' '.join(_FAISS)}, then install the one that you need",
        )
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    which = there[0] if there else faiss.__version__
    if torch.cuda.is_available() and not gpus:
        return Finding(
            "faiss", "look", f"{which} sees no GPU: the CPU searches, see docs/scaling.md"
        )
    return Finding("faiss", "good", f"{which}, {gpus} GPUs")


def _installed(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
