"""The header of a GGUF file, checked before the file is converted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from ragcache.errors import ModelError

_MAGIC = b"GGUF"
_SPLIT = re.compile(r".*-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that is named or begins as GGUF."""
    if not os.path.isfile(path):  # also False for a path that cannot be looked up
        return False
    return path.suffix.lower() == ".gguf" or _begins_as_gguf(path)


def _begins_as_gguf(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about the model in it."""

    file: Path
    architecture: str
    parameters: int
    tensors: dict[str, int]  # elements of each tensor, by its name in the file
    rope_base: float | None  # None if the file does not say
    sliding_window: int | None  # in tokens; None without one

    @staticmethod
    def check_file(file: Path) -> None:
        """Raise ModelError if the file cannot be read, is not GGUF, or is part of a split file."""
        try:
            with file.open("rb") as opened:
                magic = opened.read(len(_MAGIC))
        except OSError as error:
            raise ModelError(
                f"{file} cannot be read ({error.strerror}): make it readable for this user"
            ) from error
        if magic != _MAGIC:
            raise ModelError(
                f"{file} is not a GGUF file: it begins with {magic!r} instead of {_MAGIC!r}. "
                "Download it again; a download that failed may have left a web page."
            )
        if (split := _SPLIT.fullmatch(file.name)) and int(split[1]) > 1:
            raise ModelError(_split(file))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read and check a file's header. Raises ModelError for one that cannot be converted."""
        cls.check_file(file)
        _require_packages()
        from gguf import GGUFReader

        try:
            reader = GGUFReader(file)
            fields = {key: field.contents() for key, field in _scalars(reader.fields)}
        except Exception as error:  # any kind, for a damaged file
            raise ModelError(_unreadable(file, error)) from error
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        architecture = str(fields.get("general.architecture", ""))
        header = cls(
            file,
            architecture,
            sum(tensors.values()),
            tensors,
            fields.get(f"{architecture}.rope.freq_base"),
            fields.get(f"{architecture}.attention.sliding_window") or None,
        )
        _refuse_other_contents(header, fields, set(reader.fields))
        if (layers := int(fields.get(f"{architecture}.block_count", 0))) > len(tensors):
            raise ModelError(  # building them could take forever
                f"{file.name} says that it has {layers:,} layers, but it has {len(tensors)} "
                "tensors: it is damaged. Download it again."
            )
        _refuse_rope_scaling(header, fields)
        _refuse_types(header, reader.tensors)
        return header

    def check_config(self, config: dict[str, Any], parameters: int) -> None:
        """Raise ModelError if transformers' configuration of the model contradicts the file.

        The loader does not read every entry of every architecture, and uses a default instead.
        ``parameters``: how many the configuration describes; tensors that are not in the file, such
        as tied weights, are fewer than half of any model's.
        """
        if parameters > 2 * self.parameters:
            raise ModelError(
                f"{self.file.name} describes {parameters:,} parameters, but its tensors have "
                f"{self.parameters:,}: it is damaged. Download it again."
            )
        for what, said, found in (
            ("RoPE's base", self.rope_base, _values(config, "rope_theta", "rope_local_base_freq")),
            ("its sliding window", self.sliding_window, _values(config, "sliding_window")),
        ):
            if said is not None and not any(abs(one - said) <= 1e-6 * said for one in found):
                raise ModelError(
                    f"{self.file.name} says that {what} is {said:g}, which transformers does not "
                    f"read from a GGUF file of architecture {self.architecture}: it takes "
                    f"{found[0] if found else None}. Use the same model as safetensors."
                )

    @contextmanager
    def refusing(self, what: str) -> Iterator[None]:
        """Turn every exception of a library into a ModelError."""
        try:
            yield
        except MemoryError as error:
            raise ModelError(
                f"the {what} of {self.file.name} does not fit this machine's memory: use a "
                "smaller model"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"transformers cannot load the {what} of {self.file}, of architecture "
                f"{self.architecture}: {reason[:300]}. Use another file, or the same model as "
                "safetensors."
            ) from error


def _scalars(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields that are one number or text: long arrays are not decoded."""
    return ((key, field) for key, field in fields.items() if len(field.types) == 1)


def _values(config: dict[str, Any], *keys: str) -> list[float]:
    """The numbers under ``keys`` in a configuration, at any depth."""
    own = [value for key in keys if isinstance(value := config.get(key), (int, float))]
    parts = [part for part in config.values() if isinstance(part, dict)]
    return own + [value for part in parts for value in _values(part, *keys)]


def _require_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"a GGUF file is converted with the packages gguf and accelerate, and "
            f"{' and '.join(missing)} cannot be imported. Run "
            '`pip install "ragcache-fusion[gguf]"`.'
        )


def _split(file: Path) -> str:
    first = re.sub(r"-\d{5}-of-", "-00001-of-", file.name)
    return (
        f"{file.name} is one part of a split GGUF file: merge the parts with llama.cpp's "
        f"`llama-gguf-split --merge {first} MERGED.gguf`, and name the merged file"
    )


def _unreadable(file: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "GGMLQuantizationType" in reason:
        return (
            f"{file} has tensors of a type that the package gguf does not know ({reason}): "
            "upgrade gguf, or take another quantisation of the model"
        )
    return (
        f"{file} is damaged or truncated: its {file.stat().st_size:,} bytes cannot be read as GGUF "
        f"({reason[:200]}). Download it again."
    )


def _refuse_other_contents(header: GgufHeader, fields: dict[str, Any], keys: set[str]) -> None:
    """Raise ModelError for a file without a whole language model."""
    name, kind = header.file.name, str(fields.get("general.type", "model"))
    if int(fields.get("split.count", 1)) > 1:
        raise ModelError(_split(header.file))
    if kind in ("adapter", "mmproj", "imatrix") or header.architecture == "clip":
        raise ModelError(
            f"{header.file} holds no language model but {'mmproj' if kind == 'model' else kind} "
            "(general.type): name the file of the model itself"
        )
    if not header.tensors:
        raise ModelError(f"{name} has a vocabulary and no tensors: name the file of a model")
    known = _architectures()
    if _bare(header.architecture) not in map(_bare, known):
        raise ModelError(
            f"{name} has a model of the architecture {header.architecture!r}, which transformers "
            f"does not read from GGUF. It reads {', '.join(known)}. Use the same model as "
            "safetensors."
        )
    if "tokenizer.ggml.model" not in keys or "tokenizer.ggml.tokens" not in keys:
        raise ModelError(
            f"{name} has no tokenizer (tokenizer.ggml.tokens): use a file with one, or the same "
            "model as safetensors"
        )


def _refuse_rope_scaling(header: GgufHeader, fields: dict[str, Any]) -> None:
    """Raise ModelError for scaled RoPE, which transformers' loader leaves out without a word."""
    entries = {key.partition(".rope.")[2]: value for key, value in fields.items()}
    scaled = [
        f"{name} {entries[name]}"
        for name, plain in (("scaling.type", "none"), ("scale_linear", 1.0))
        if entries.get(name, plain) != plain
    ]
    scaled += [name for name in header.tensors if "rope_f" in name]  # rope_freqs, rope_factors
    if scaled:
        raise ModelError(
            f"{header.file.name} has scaled RoPE ({scaled[0]}), which transformers does not read "
            "from GGUF: the model would compute something else. Use the same model as safetensors."
        )


def _refuse_types(header: GgufHeader, tensors: Any) -> None:
    """Raise ModelError for tensors of a type that the package gguf cannot dequantise."""
    from gguf import dequantize

    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{header.file.name} has tensors of type {kind.name}, such as {tensor.name}, which "
                "the package gguf cannot dequantise: take another quantisation of the model"
            ) from error


def _architectures() -> list[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer", "t5", "umt5"})


def _bare(name: str) -> str:
    return name.replace("-", "").replace("_", "")
