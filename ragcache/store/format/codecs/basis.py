"""Bases of transform coding: what a model's KV has in common, learned once from any text.

Keys and values of neighbouring layers are strongly correlated. A basis holds, for every group of
consecutive layers, an orthonormal transform to components that are not, in the order of their
variance (principal components, as in KVTC, arXiv:2511.01815), how widely each component spreads,
and the quantisation step of every level of compression. It is an artefact of the store, a file in
its folder ``codecs``, and the digest of that file is part of the codec's name, so of every key.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load, save

from ragcache.errors import StoreError
from ragcache.util.private_file import open_private

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.types import Fingerprint

__all__ = ["Basis", "bases_of", "find_basis"]

FOLDER = "codecs"  # in a store
MOST_BYTES = 4 << 30  # of a file that is read from a remote
_FORMAT = "ragcache basis 1"
_SUFFIX = ".basis"
_DIGITS = 16  # of the digest in names

_LOCK = threading.Lock()
_FOLDERS: dict[Path, None] = {}  # of the stores of this process, in the order of opening
_LOADED: dict[str, Basis] = {}


@dataclass(frozen=True, eq=False)
class GroupBasis:
    """The transform of a group of layers, of rows of G = 2 * layers * kv_heads * head_dim numbers:
    the weighted keys of a token in its first layer, the values there, the keys of the next, ..."""

    mean: Tensor  # (G,), float32
    components: Tensor  # (r, G), float32, orthonormal rows, by falling variance
    scales: Tensor  # (r,), float32: mean magnitude of each component
    #: Per level, the number of each component's distribution; uint8, (kept,), kept <= r: the
    #: others are 0.
    spreads: Mapping[int, Tensor]
    errors: Mapping[int, float]  # per level, the mean squared error of a row

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        return self.mean, self.components, self.scales


@dataclass(frozen=True, eq=False)
class Basis:
    """See :mod:`ragcache.store.format.codecs.basis`. It does not change once it is made."""

    model: str  # digest of the model's fingerprint with codec raw, in hex
    kv_heads: int
    head_dim: int
    together: int  # layers in a group; the last group may have fewer
    weights: Tensor  # (layers, 2), float32: of keys and of values; errors count times these
    groups: Sequence[GroupBasis]
    steps: Mapping[int, float]  # by level
    #: (kinds, symbols), float32: the distributions, whole numbers as constriction takes them. Those
    #: of fewer symbols have zeros at both ends.
    tables: Tensor

    @property
    def layers(self) -> int:
        return len(self.weights)

    def layers_of(self, group: int) -> range:
        first = group * self.together
        return range(first, min(first + self.together, self.layers))

    def rows(self, planes: Tensor, layers: range) -> Tensor:
        """Weighted rows (tokens, G) of planes (2 * layers, kv_heads, tokens, head_dim)."""
        weights = self.weights[layers.start : layers.stop].reshape(-1, 1, 1, 1)
        return (planes.float() * weights).permute(2, 0, 1, 3).flatten(1)

    @cached_property
    def data(self) -> bytes:
        """The bytes of its file."""
        tensors = {"weights": self.weights, "tables": self.tables}
        for number, one in enumerate(self.groups):
            tensors[f"{number}.mean"] = one.mean
            tensors[f"{number}.components"] = one.components.half()
            tensors[f"{number}.scales"] = one.scales
            for level, spreads in one.spreads.items():
                tensors[f"{number}.spreads.{level}"] = spreads
        steps = {str(level): step for level, step in self.steps.items()}
        about = {
            "format": _FORMAT,
            "model": self.model,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "together": self.together,
            "steps": steps,
            "errors": [{str(n): error for n, error in one.errors.items()} for one in self.groups],
        }
        metadata = {"about": json.dumps(about, sort_keys=True)}  # one: they come in any order
        return save({name: t.contiguous() for name, t in tensors.items()}, metadata)

    @cached_property
    def digest(self) -> str:
        return blake3(self.data).hexdigest()[:_DIGITS]

    def is_of(self, fingerprint: Fingerprint) -> bool:
        """Whether it was learned from the KV of this model, whatever its codec."""
        return self.model == fingerprint.with_codec("raw").digest.hex()

    @property
    def file_name(self) -> str:
        return f"{self.digest}{_SUFFIX}"

    def is_in(self, store: Path) -> bool:
        return (store / FOLDER / self.file_name).exists()

    def write(self, store: Path) -> None:
        """Write it into the folder of a store. Raises StoreError."""
        folder = store / FOLDER
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / self.file_name
            part = path.with_name(f"{path.name}.{os.getpid()}")
            with open_private(part, "wb") as file:
                file.write(self.data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise StoreError(
                f"the basis of the codec cannot be written to {folder}: {error.strerror}. Make "
                "room, or let this user write there."
            ) from error

    @classmethod
    def parse(cls, data: bytes) -> Basis:
        """What :attr:`data` describes. Raises ValueError for anything else."""
        try:
            tensors = load(data)
            (size,) = struct.unpack_from("<Q", data)
            metadata = json.loads(data[8 : 8 + size])["__metadata__"]
            about = json.loads(metadata["about"])
            if about["format"] != _FORMAT:
                raise ValueError(f"its format is {about['format']}, and this reads {_FORMAT}")
            steps = {int(level): float(step) for level, step in about["steps"].items()}
            count = -(-len(tensors["weights"]) // int(about["together"]))
            errors = [{int(n): float(e) for n, e in one.items()} for one in about["errors"]]
            groups = [_group(tensors, number, errors[number]) for number in range(count)]
            made = cls(
                str(about["model"]),
                int(about["kv_heads"]),
                int(about["head_dim"]),
                int(about["together"]),
                tensors["weights"],
                groups,
                steps,
                tensors["tables"],
            )
        except (SafetensorError, struct.error, LookupError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"it is no basis: {error}") from error
        made._check()
        made.__dict__["data"] = data  # as it was written
        return made

    def _check(self) -> None:
        """Raise ValueError for shapes that do not fit, and numbers that are not finite."""
        floats = (self.tables, self.weights, *(t for one in self.groups for t in one.numbers))
        if any(tensor.dtype != torch.float32 for tensor in floats) or self.together < 1:
            raise ValueError("its numbers are of other types")
        if not all(map(_is_finite, floats)) or not all(0 < s < inf for s in self.steps.values()):
            raise ValueError("its numbers or steps are not finite")
        if self.tables.dim() != 2 or not self.steps or self.weights.shape != (self.layers, 2):
            raise ValueError("its distributions, steps or weights are none")
        kinds, symbols = self.tables.shape
        used = self.tables > 0
        whole = (self.tables >= 0).all() and (self.tables == self.tables.round()).all()
        middle = used.flip(1).equal(used) and (used.diff(dim=1).sum(1) <= 2).all()
        if not whole or not middle or not symbols % 2 or not used[:, symbols // 2].all():
            raise ValueError("its distributions are none")
        if not (self.weights > 0).all():
            raise ValueError("its weights are none")
        for number, one in enumerate(self.groups):
            width = 2 * len(self.layers_of(number)) * self.kv_heads * self.head_dim
            rank = len(one.scales)
            if one.mean.shape != (width,) or one.components.shape != (rank, width):
                raise ValueError(f"group {number} has another shape than its layers")
            if one.spreads.keys() != self.steps.keys():
                raise ValueError(f"group {number} has other levels than the basis")
            for spreads in one.spreads.values():
                if spreads.dtype != torch.uint8 or spreads.dim() != 1:
                    raise ValueError(f"group {number} names distributions by other types")
                if len(spreads) > rank or (len(spreads) and int(spreads.max()) >= kinds):
                    raise ValueError(f"group {number} names distributions that there are not")


def _group(tensors: Mapping[str, Tensor], number: int, errors: Mapping[int, float]) -> GroupBasis:
    return GroupBasis(
        tensors[f"{number}.mean"].float(),
        tensors[f"{number}.components"].float(),
        tensors[f"{number}.scales"].float(),
        {level: tensors[f"{number}.spreads.{level}"] for level in errors},
        errors,
    )


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def basis_files(store: Path) -> list[Path]:
    """The files of the bases in a store, by name."""
    return sorted((store / FOLDER).glob(f"*{_SUFFIX}"))


def register_bases(store: Path) -> None:
    """Let :func:`find_basis` find the bases of the store in this folder."""
    with _LOCK:
        _FOLDERS[store / FOLDER] = None


def find_basis(digest: str) -> Basis | str:
    """The basis with this digest, from one of the stores that this process has opened; or why
    there is none, in words."""
    with _LOCK:
        if digest in _LOADED:
            return _LOADED[digest]
        why = "no store that is open has it: copy the folder `codecs` of the store that it is from"
        for folder in _FOLDERS:
            path = folder / f"{digest}{_SUFFIX}"
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                why = f"{path} cannot be read: {error.strerror}"
                continue
            if blake3(data).hexdigest()[:_DIGITS] != digest:
                why = f"{path} is damaged: copy it from another store again"
                continue
            try:
                made = Basis.parse(data)
            except ValueError as error:
                why = f"{path} cannot be used: {error}"
                continue
            _LOADED[digest] = made
            return made
    return why


def bases_of(store: Path) -> list[Basis]:
    """The bases of a store that can be used. Registers it."""
    register_bases(store)
    found = (find_basis(path.stem) for path in basis_files(store))
    return [one for one in found if isinstance(one, Basis)]
