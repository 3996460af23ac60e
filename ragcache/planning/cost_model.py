"""The cost model: how fast a model computes on this machine, and how fast its KV is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Self

from ragcache.store.remote.bandwidth import LinkEstimate

__all__ = ["Speeds"]

_VERSION = 4  # raised when a field changes: speeds recorded with another version are measured again


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measured times of one engine over one store, in seconds, none of them negative.

    Reading in a thread overlaps with computing, but slows it down: both need Python's global lock,
    and, if the model runs on the CPU, the same cores. ``overlap_penalty`` measures by how much.
    """

    start_s: float  # per prefill, whatever it computes
    row_s: float  # per computed row
    pair_s: float  # per computed row and row of the prompt (attention)
    place_s: float  # per loaded row: its keys are rotated, and it is written to the cache
    read_s: float  # per layer of a chunk that is read
    byte_s: float  # per stored byte
    token_s: float  # per token of the answer after the first
    #: At least this is what computing takes: a GPU computes while its kernels are launched.
    launch_s: float = 0.0
    #: Share of the reading time by which reading delays computing, in [0, 1].
    overlap_penalty: float = 0.0
    measured: str = ""  # date and time of the measurement, for display
    #: Codec -> time per stored byte to decode it, in addition to ``byte_s`` of the store's codec.
    decode_s: Mapping[str, float] = field(default_factory=dict)
    link: LinkEstimate | None = None  # to a remote store, as it is now; never recorded

    def __post_init__(self) -> None:
        for name, value in (*self._seconds().items(), *self.decode_s.items()):
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: it must be 0 or more seconds")
        if self.overlap_penalty > 1:
            raise ValueError(f"overlap_penalty is {self.overlap_penalty}: it must be in [0, 1]")

    def compute_s(self, rows: float, total: int, placed: int) -> float:
        """Seconds to compute ``rows`` of a prompt of ``total``, of which ``placed`` are loaded."""
        computing = self.start_s + self.row_s * rows + self.pair_s * rows * total
        return max(self.launch_s, computing) + self.place_s * placed

    def load_s(self, reads: int, size: int) -> float:
        """Seconds to read ``size`` stored bytes in ``reads`` layers of chunks."""
        return self.read_s * reads + self.byte_s * size

    def as_json(self) -> str:
        known = {"measured": self.measured, "decode_s": dict(self.decode_s)}
        return json.dumps({"version": _VERSION, **self._seconds(), **known})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`as_json` wrote. Raises ValueError for anything else, and for another
        version."""
        found = json.loads(text)
        names = {f.name for f in fields(cls)} - {"link"}
        if not isinstance(found, dict) or found.pop("version", None) != _VERSION:
            raise ValueError(f"this is no record of speeds of version {_VERSION}")
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
        """The recorded numbers: times in seconds, and the overlap penalty."""
        others = "measured", "decode_s", "link"
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
