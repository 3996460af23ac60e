"""The files that a language model is loaded from, looked at before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ragcache.errors import ModelError
from ragcache.models.hub import find_model_folder, gguf_advice

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SMALL = re.compile(r"[^/]+\.(json|jinja|model|txt)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
#: Weights that are read by unpickling, which runs whatever code they hold.
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)")
#: What an outline is made of without weights to compare with.
_MOST_LAYERS = 1000
_LAYERS = re.compile(r"(n|num)_.*layers?|layers")


@dataclass(frozen=True)
class ModelConfig:
    """What is written of a model: its shape, without weights."""

    name: str  # for people: the folder's name, or the hub's
    folder: Path
    config: dict[str, Any]  # config.json as it is

    @staticmethod
    def read(name: str | Path) -> ModelConfig:
        """Of a folder or hub name, of which no weights are brought. Raises ModelError, also for
        more layers than any model has: an outline of them would take for ever."""
        folder = find_model_folder(
            str(name), _described, lambda listed: [n for n in listed if n == CONFIG]
        )
        config = _described(folder)
        _check_layers(
            folder, config, _MOST_LAYERS, f"the most that is planned for is {_MOST_LAYERS}"
        )
        return ModelConfig(_called(name, folder), folder, config)


@dataclass(frozen=True)
class Checkpoint(ModelConfig):
    """A model's folder: configuration, tokenizer and safetensors. Raises ValueError without
    weights: what is known of a model is known by the files that it is loaded from.

    Another format of weights is another class beside this one, with loaders of its own in
    :mod:`ragcache.engine.hf.loading`: :meth:`of` is where a name becomes one.
    """

    weights: tuple[Path, ...]  # the files that hold tensors, at least one

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"{self.name} has no files of weights: it is no checkpoint")

    @classmethod
    def of(cls, name: str | Path) -> Self:
        """Of a folder or hub name, whose files are brought here where they are missing.

        ModelError says of anything that cannot be loaded what it is and what to do: weights that
        are no safetensors, quantised ones, adapters, files that are damaged or do not belong
        together, and names of nothing.
        """
        folder = find_model_folder(str(name), _looked_at, _loadable_files)
        config, weights = _looked_at(folder)
        return cls(_called(name, folder), folder, config, weights)

    @property
    def files(self) -> list[Path]:
        """All that decides which weights are loaded."""
        beside = [self.folder / name for name in (CONFIG, INDEX)]
        return [*self.weights, *(file for file in beside if file.is_file())]


def _called(name: str | Path, folder: Path) -> str:
    return folder.absolute().name if Path(name).expanduser().is_dir() else str(name)


def _loadable_files(listed: Sequence[str]) -> list[str]:
    """Of the files of a model in the hub, those that are loaded from."""
    weights = [name for name in listed if name == WEIGHTS]
    weights = weights or [name for name in listed if _SHARD.fullmatch(name)]
    if not weights:
        raise ModelError(_no_safetensors("the model", listed))
    return [name for name in listed if _SMALL.fullmatch(name)] + weights


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one object. Raises ModelError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ModelError(
            f"{file} cannot be read ({said}): it is damaged or cut off. Get the model's files anew."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is no JSON object: it is damaged. Get the model's files anew.")
    return found


def pickle_files(names: Sequence[str]) -> list[str]:
    """Those of these files whose reading can run code."""
    return sorted(name for name in names if _PICKLED.fullmatch(name))


def pickle_refusal(what: str, name: str, conversion: str) -> str:
    """That the weights in ``name`` are not loaded, and the one line that converts them."""
    return (
        f"{what} has its weights in {name}, which can hold code, and ragcache reads safetensors "
        f'only. If you trust these files, convert them once: python -c "{conversion}"'
    )


def _looked_at(folder: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The configuration and the files of weights of a folder that can be loaded from."""
    names = sorted(file.name for file in folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which is loaded on top of another "
            "model: merge the two (merge_and_unload of peft) and name the folder of the result"
        )
    config = _described(folder)
    _refuse_quantised(folder, config)
    weights = _weights(folder, config, names)
    tensors = sum(map(_tensors, weights))
    _check_layers(
        folder, config, tensors, f"its weights are {tensors} tensors: they do not belong together"
    )
    return config, weights


def _described(folder: Path) -> dict[str, Any]:
    """The configuration of a folder. Raises ModelError."""
    names = sorted(file.name for file in folder.iterdir())
    if CONFIG not in names:
        raise ModelError(
            f"{folder} has no {CONFIG}, so it is no model that can be loaded: "
            + (gguf_advice(*(str(folder / name) for name in names)) or _A_MODEL_IS)
        )
    return read_json(folder / CONFIG)


_A_MODEL_IS = "a model is a folder with config.json, safetensors and tokenizer.json. Name one."


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
    """The files that transformers loads tensors from."""
    if config.get("transformers_weights"):
        raise ModelError(
            f"{folder / CONFIG} names files of weights (transformers_weights): call them {WEIGHTS} "
            "as everybody does, and remove that entry"
        )
    if any(re.match(r"shard-\d+-model-\d+-of-\d+\.safetensors", name) for name in names):
        raise ModelError(
            f"{folder} is what a distributed training has saved, a part for each process: load it "
            "with transformers and save it whole (save_pretrained)"
        )
    if WEIGHTS in names:
        return (folder / WEIGHTS,)
    if INDEX not in names:
        raise ModelError(_no_safetensors(str(folder), names, folder))
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(map(_plain, index.values())):
        raise ModelError(f"{folder / INDEX} maps no tensors to files: get the model's files anew")
    files = sorted({folder / name for name in index.values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(files)} files of weights, {missing[0]} for "
            "one: get the model's files anew"
        )
    return tuple(files)


def _plain(name: object) -> bool:
    """Whether it names a file of the folder itself."""
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
    paths = [name if folder is None else str(folder / name) for name in names]
    return f"{what} has no safetensors: {gguf_advice(*paths) or _A_MODEL_IS}"


def _tensors(file: Path) -> int:
    """How many a file holds. Raises ModelError where it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return len(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is damaged or cut off ({str(error) or type(error).__name__}): get it anew"
        ) from error


def _check_layers(folder: Path, config: dict[str, Any], most: int, why: str) -> None:
    """Raise ModelError where any part of a configuration has more layers: making them would take
    for ever."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if _LAYERS.fullmatch(key) and isinstance(value, int) and value > most:
                raise ModelError(
                    f"{folder / CONFIG} says {key} = {value}, and {why}. Get the files anew."
                )
