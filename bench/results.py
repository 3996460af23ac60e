"""Shared by benchmarks: a description of the machine, tables, and saved results."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ragcache.util.cores import usable_cores

ROOT = Path(__file__).parent.parent
OUTCOMES = ROOT / "bench" / "outcomes"  # of long runs on real models, kept with the code
_FREE_PEAK = "5"  # what /proc/self/clear_refs takes to begin the peak anew, see proc(5)


@dataclass(frozen=True)
class Kept:
    """The results of one run of a benchmark, and the machine it ran on."""

    machine: str
    commit: str
    peak_mib: int  # of the process, the whole run
    found: Any


def machine() -> str:
    """Processor, cores, memory and torch, in a line."""
    model = "unknown processor"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((s.partition(":")[2].strip() for s in lines if s.startswith("model n")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model} ({torch.backends.cpu.get_cpu_capability()}), {usable_cores()} cores, "
        f"{memory:.0f} GiB, torch {torch.__version__} with {torch.get_num_threads()} threads"
    )


def commit() -> str:
    """The commit of the working tree, with ``-dirty`` if it has changes."""
    describe = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def begin_peak() -> None:
    """Reset :func:`peak_mib`, if the system can. Freed memory is first returned to the system, so
    that it does not count."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_FREE_PEAK)


def peak_mib() -> int:
    """Peak memory (RSS) of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    rule = f"|---|{'--:|' * (len(heads) - 1)}"
    shown = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([shown[0], rule, *shown[1:]]) + "\n"


def parser(about: str | None) -> ArgumentParser:
    made = ArgumentParser(description=about)
    made.add_argument("--out", type=Path, help="folder to keep the results in, as JSON")
    return made


def finish(name: str, found: Any, shown: str, out: Path | None) -> None:
    """Print the table of the results ``found``, and save them if ``out`` is given."""
    kept = Kept(machine(), commit(), peak_mib(), found)
    print(f"{kept.machine}; commit {kept.commit}; peak memory {kept.peak_mib:,} MiB\n\n{shown}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        file(out, name).write_bytes(TypeAdapter(Kept).dump_json(kept, indent=1) + b"\n")


def load(out: Path, name: str, kind: Any) -> Kept:
    """The results that :func:`finish` saved; ``kind`` is their type."""
    kept = TypeAdapter(Kept).validate_json(file(out, name).read_bytes())
    found = TypeAdapter(kind).validate_python(kept.found)
    return Kept(kept.machine, kept.commit, kept.peak_mib, found)


def file(out: Path, name: str) -> Path:
    return out / f"{name}.json"
