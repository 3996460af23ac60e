"""How the driver talks to a system: JSON objects, one per line, over the process's pipes.

The driver sends a :class:`Setup`, and the system replies with its :class:`Loaded` or an ``error``.
The driver then sends one :class:`Ask` at a time, and the system replies with an :class:`Answered`.
This module needs only the standard library, because it is imported in every environment.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar


@dataclass(frozen=True)
class Setup:
    """What a system needs to know before it loads the model."""

    model: str  # folder with safetensors and tokenizer
    gguf: str  # the file with the same weights in GGUF; empty if there is none
    threads: int
    answer: int  # tokens
    longest: int  # tokens of the longest prompt with its answer
    prefix: list[int]  # what every prompt begins with
    pool: list[list[int]]  # every chunk of the prompts


@dataclass(frozen=True)
class Ask:
    """A prompt as token ids, and the mode to answer it in."""

    mode: str
    prefix: list[int]
    chunks: list[list[int]]
    question: list[int]
    answer: int  # tokens at most

    @property
    def ids(self) -> list[int]:
        return [*self.prefix, *(token for chunk in self.chunks for token in chunk), *self.question]


@dataclass(frozen=True)
class Answered:
    """A greedy answer."""

    tokens: list[int]
    ttft_s: float  # from the token ids of the prompt to the first token's id
    computed: float | None = None  # rows of the prompt that went through the layers, if known
    peak_mib: int = 0  # of the process so far


@dataclass(frozen=True)
class Mode:
    name: str
    full: str  # the mode of the same system that computes the whole prompt
    prompt: str = "as it is"  # how the prompt is changed


@dataclass(frozen=True)
class Loaded:
    """What a system says about itself."""

    modes: list[Mode]
    versions: dict[str, str]
    packages: int  # of the environment that the system needs
    disk_mib: int  # of these packages
    settings: str


class System(ABC):
    """A loaded model with its caches."""

    modes: ClassVar[Sequence[Mode]]
    distributions: ClassVar[Sequence[str]]  # their versions are named, their dependencies counted
    settings: ClassVar[str]  # what was set, other than by default

    @abstractmethod
    def ask(self, ask: Ask) -> Answered:
        """Answer greedily. What this stores must not change the answers in other modes."""


def serve(load: Callable[[Setup], System]) -> None:
    """Answer the driver's requests until it closes the pipe. What libraries print goes to stderr.

    An exception is sent as an ``error`` that names the place in the system's code.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        lines = iter(sys.stdin)
        system = load(Setup(**json.loads(next(lines))))
        packages, size = installed(system.distributions)
        versions = {name: metadata.version(name) for name in system.distributions}
        _send(replies, Loaded(list(system.modes), versions, packages, size, system.settings))
        for line in lines:
            answered = asdict(system.ask(Ask(**json.loads(line))))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            _send(replies, {**answered, "peak_mib": peak})
    except Exception as error:  # noqa: BLE001  # the driver prints it as the system's row
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}"
        _send(replies, {"error": f"{type(error).__name__}: {error} ({where})"})


def _send(replies: IO[str], message: Any) -> None:
    body = message if isinstance(message, dict) else asdict(message)
    replies.write(json.dumps(body) + "\n")
    replies.flush()


def installed(distributions: Iterable[str]) -> tuple[int, int]:
    """The number of installed packages that the distributions need, themselves included, and their
    size in MiB. Optional dependencies do not count."""
    waiting, seen, size = list(distributions), set[str](), 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        with suppress(metadata.PackageNotFoundError):
            found = metadata.distribution(name)
            seen.add(name)
            size += sum(_sizes(found))
            needs = (need for need in found.requires or () if "extra ==" not in need)
            waiting += [re.split(r"[ <>=!~;\[(]", need)[0] for need in needs]
    return len(seen), size >> 20


def _sizes(found: metadata.Distribution) -> Iterator[int]:
    for path in found.files or ():
        with suppress(OSError):
            yield os.stat(str(path.locate())).st_size
