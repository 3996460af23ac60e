"""How fast a model computes here, and how fast its KV comes from a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Self

from ragcache.store.remote.bandwidth import LinkEstimate

VERSION = 2  # another one where the meaning of a field changes: what was recorded is then measured


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measured times of one engine over one store: seconds, none of them negative.

    Reading goes on beside computing, and yet takes something from it: Python's lock, and cores
    where the model runs on the CPU too.
    """

    start_s: float  # of any prefill, whatever it computes
    row_s: float  # per computed row
    pair_s: float  # per computed row and row of the prompt: it attends to all of them
    place_s: float  # per loaded row: moved to its position and written among the others
    read_s: float  # per layer of a chunk that is read
    byte_s: float  # per byte of it, as it is stored
    token_s: float  # per token of the answer but the first
    stolen: float = 0.0  # share of the time of reading by which it delays computing, in [0, 1]
    measured: str = ""  # when, for people
    #: By codec, to decode a byte of it, on top of what a byte of the store's own codec takes.
    decode_s: Mapping[str, float] = field(default_factory=dict)
    link: LinkEstimate | None = None  # to a remote, as it is now: never recorded

    def __post_init__(self) -> None:
        for name, value in (*self._seconds().items(), *self.decode_s.items()):
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: it must be 0 or more seconds")
        if self.stolen > 1:
            raise ValueError(f"stolen is {self.stolen}: it must be in [0, 1]")

    def compute_s(self, rows: float, total: int, placed: int) -> float:
        """Seconds to compute ``rows`` of a prompt of ``total``, of which ``placed`` are loaded."""
        attended = self.pair_s * rows * total
        return self.start_s + self.row_s * rows + attended + self.place_s * placed

    def load_s(self, reads: int, size: int) -> float:
        """Seconds to read ``size`` stored bytes in ``reads`` layers of chunks."""
        return self.read_s * reads + self.byte_s * size

    def as_json(self) -> str:
        known = {"measured": self.measured, "decode_s": dict(self.decode_s)}
        return json.dumps({"version": VERSION, **self._seconds(), **known})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`as_json` wrote. Raises ValueError for anything else, another version too."""
        found = json.loads(text)
        names = {f.name for f in fields(cls)} - {"link"}
        if not isinstance(found, dict) or found.pop("version", None) != VERSION:
            raise ValueError(f"no speeds of version {VERSION}")
        if found.keys() != names or not isinstance(found["measured"], str):
            raise ValueError(f"speeds have the fields {', '.join(sorted(names))}")
        if not isinstance(found["decode_s"], dict):
            raise ValueError(f"decode_s is {found['decode_s']!r}: it must be an object")
        numbers = {name: found[name] for name in names - {"measured", "decode_s"}}
        for name, value in (*numbers.items(), *found["decode_s"].items()):
            if type(value) not in (int, float):
                raise ValueError(f"{name} is {value!r}: it must be a number")
        return cls(**found)

    def _seconds(self) -> dict[str, Any]:
        """What is measured of the machine, in seconds and a share."""
        others = "measured", "decode_s", "link"
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
