"""The files that a language model is loaded from, checked before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ragcache.errors import ModelError
from ragcache.models.gguf import converted_folder
from ragcache.models.gguf_header import is_gguf
from ragcache.models.hub import find_model_folder, refuse_bytes
from ragcache.models.packaged import packaged_name

__all__ = ["CONFIG", "Checkpoint", "ModelConfig", "pickle_files", "pickle_refusal", "read_json"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SMALL = re.compile(r"[^/]+\.(json|jinja|model|txt)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
#: Weights that are read by unpickling, which can run arbitrary code.
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)")
_MAX_LAYERS = 1000  # of a model whose weights are not there to compare with
_LAYERS = re.compile(r"(n|num)_.*layers?|layers")


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration, without weights."""

    name: str  # for display: the folder's name, or the hub name
    folder: Path
    config: dict[str, Any]  # the content of config.json

    @staticmethod
    def read(name: str | Path) -> ModelConfig:
        """Read the configuration of a folder, GGUF file or hub name, without downloading weights.

        Raises ModelError, also for more layers than any model has: building them would take
        forever.
        """
        folder = find_model_folder(
            _converted(name), _read_config, lambda listed: [n for n in listed if n == CONFIG]
        )
        config = _read_config(folder)
        _check_layers(folder, config, _MAX_LAYERS, f"ragcache supports at most {_MAX_LAYERS}")
        return ModelConfig(_display_name(name, folder), folder, config)


@dataclass(frozen=True)
class Checkpoint(ModelConfig):
    """A model's folder with configuration, tokenizer and safetensors.

    Raises ValueError without weights, by whose files a model is identified. Support for another
    format of weights would be another class beside this one, with loaders of its own in
    :mod:`ragcache.engine.hf.loading`.
    """

    weights: tuple[Path, ...]  # the files that hold tensors, at least one

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"{self.name} has no weight files: it is not a checkpoint")

    @classmethod
    def of(cls, name: str | Path) -> Self:
        """The checkpoint of a folder, GGUF file or hub name.

        A GGUF file is converted, once, and missing files of a hub model are downloaded.

        Raises ModelError, with the fix, for anything that cannot be loaded: weights in other
        formats than safetensors, quantised weights, adapters, files that are damaged or do not
        belong together, and unknown names.
        """
        folder = find_model_folder(_converted(name), _read_checked, _loadable_files)
        config, weights = _read_checked(folder)
        return cls(_display_name(name, folder), folder, config, weights)

    @property
    def files(self) -> list[Path]:
        """All files that determine the loaded weights."""
        others = [self.folder / name for name in (CONFIG, INDEX)]
        return [*self.weights, *(file for file in others if file.is_file())]


def _converted(name: str | Path) -> str:
    """The folder into which ``name`` is converted if that is a GGUF file; else ``name``."""
    path = Path(os.path.expanduser(name))
    if not is_gguf(path):
        return str(name)
    refuse_bytes(path)
    return str(converted_folder(path))


def _display_name(name: str | Path, folder: Path) -> str:
    path = Path(os.path.expanduser(name))
    if is_gguf(path):
        return packaged_name(path) or path.stem
    return folder.absolute().name if os.path.isdir(path) else str(name)


def _loadable_files(listed: Sequence[str]) -> list[str]:
    """Of a hub model's files, those to download. Raises ModelError without safetensors."""
    weights = [name for name in listed if name == WEIGHTS]
    weights = weights or [name for name in listed if _SHARD.fullmatch(name)]
    if not weights:
        raise ModelError(_no_safetensors("the model", listed))
    return [name for name in listed if _SMALL.fullmatch(name)] + weights


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that contains a JSON object. Raises ModelError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ModelError(
            f"{file} cannot be read ({reason}): it is damaged or truncated. Get the model's files "
            "again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{file} is not a JSON object: it is damaged. Get the model's files again."
        )
    return found


def pickle_files(names: Sequence[str]) -> list[str]:
    """Those of the files that are read by unpickling, which can run code; sorted."""
    return sorted(name for name in names if _PICKLED.fullmatch(name))


def pickle_refusal(what: str, name: str, conversion: str) -> str:
    """The message that refuses the pickled weights in ``name``, with a command to convert them."""
    return (
        f"{what} has its weights in {name}, which can hold code, and ragcache reads safetensors "
        f'only. If you trust these files, convert them once: python -c "{conversion}"'
    )


def _read_checked(folder: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Configuration and weight files of a folder. Raises ModelError if it cannot be loaded."""
    names = sorted(file.name for file in folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which is loaded on top of another "
            "model: merge the two (merge_and_unload of peft) and name the folder of the result"
        )
    config = _read_config(folder)
    _refuse_quantised(folder, config)
    weights = _weights(folder, config, names)
    tensors = sum(map(_count_tensors, weights))
    _check_layers(
        folder, config, tensors, f"its weights are {tensors} tensors: they do not belong together"
    )
    return config, weights


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder. Raises ModelError."""
    names = sorted(file.name for file in folder.iterdir())
    if CONFIG not in names:
        raise ModelError(
            f"{folder} has no {CONFIG}, so it cannot be loaded as a model: "
            + _what_to_name(names, folder)
        )
    return read_json(folder / CONFIG)


def _what_to_name(names: Sequence[str], folder: Path | None) -> str:
    """What to name instead of a folder, or a hub model, with these files."""
    for name in names:
        if name.lower().endswith(".gguf"):
            where = f"{folder / name}" if folder else f"{name}, after `hf download` of it"
            return f"a model in GGUF is named by its file. Name {where}."
    return "a model is a folder with config.json, safetensors and tokenizer.json. Name one."


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        how = part.get("quantization_config") if isinstance(part, dict) else None
        if how:
            kind = how.get("quant_method") if isinstance(how, dict) else None
            raise ModelError(
                f"{folder} has quantised weights ({kind or 'quantization_config'} in {CONFIG}), "
                "which ragcache does not compute with. Take the model's own weights in bfloat16, "
                "float16 or float32; --codec int8 makes the stored KV small."
            )


def _weights(folder: Path, config: dict[str, Any], names: Sequence[str]) -> tuple[Path, ...]:
    """The files that transformers loads tensors from. Raises ModelError."""
    if config.get("transformers_weights"):
        raise ModelError(
            f"{folder / CONFIG} names weight files of its own (transformers_weights): rename them "
            f"to {WEIGHTS}, and remove that entry"
        )
    if any(re.match(r"shard-\d+-model-\d+-of-\d+\.safetensors", name) for name in names):
        raise ModelError(
            f"{folder} is a distributed checkpoint, with one part for each process: load it with "
            "transformers and save it with save_pretrained"
        )
    if WEIGHTS in names:
        return (folder / WEIGHTS,)
    if INDEX not in names:
        raise ModelError(_no_safetensors(str(folder), names, folder))
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(map(_is_local_file, index.values())):
        raise ModelError(f"{folder / INDEX} maps no tensors to files: get the model's files again")
    files = sorted({folder / name for name in index.values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files, for example "
            f"{missing[0]}: get the model's files again"
        )
    return tuple(files)


def _is_local_file(name: object) -> bool:
    """Whether ``name`` is a safetensors file directly in the folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _no_safetensors(what: str, names: Sequence[str], folder: Path | None = None) -> str:
    if found := pickle_files(names):
        made = str(folder or "FOLDER")
        tokenizer = "" if folder else f"; T.from_pretrained({what!r}).save_pretrained({made!r})"
        conversion = (
            f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"M.from_pretrained({what!r}, use_safetensors=False).save_pretrained({made!r})"
        )
        return pickle_refusal(what, found[0], conversion + tokenizer)
    return f"{what} has no safetensors: {_what_to_name(names, folder)}"


def _count_tensors(file: Path) -> int:
    """The number of tensors in a file. Raises ModelError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return len(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is damaged or truncated ({str(error) or type(error).__name__}): get it again"
        ) from error


def _check_layers(folder: Path, config: dict[str, Any], most: int, why: str) -> None:
    """Raise ModelError for a configuration of more than ``most`` layers.

    Building them would take forever.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if _LAYERS.fullmatch(key) and isinstance(value, int) and value > most:
                raise ModelError(
                    f"{folder / CONFIG} says {key} = {value}, but {why}. Get the files again."
                )
