"""Find a model's folder: a local one, or the snapshot in the Hugging Face hub's cache.

Models are always loaded from a folder, so that the loaded files are known. A complete snapshot in
the cache is used without a request to the hub: this works offline, and a model does not change
under its store. `hf download NAME` fetches a newer version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ragcache.errors import ModelError
from ragcache.text import replace_surrogates

__all__ = ["find_model_folder"]

_LIST_TIMEOUT_S = 10  # for the hub to list a model's files


def find_model_folder(
    name: str, check: Callable[[Path], object], select: Callable[[Sequence[str]], list[str]]
) -> Path:
    """The folder of the model ``name``, a folder or hub name.

    ``check`` raises ModelError for a folder that cannot be loaded. ``select`` chooses, of all files
    of a hub model, those to download, and raises ModelError if none can be loaded. Raises
    ModelError if there is no such model, and what ``check`` and ``select`` raise.
    """
    path = Path(os.path.expanduser(name))
    _refuse_unreadable(path)
    if path.is_dir():
        refuse_bytes(path)
        check(path)
        return path
    _refuse_paths(name, path)
    folder, problem = _cached(name), None
    if folder is not None:
        try:
            check(folder)
            return folder
        except ModelError as error:  # the snapshot may be incomplete
            problem = error
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise problem or ModelError(
            f"the model {name} is not on this machine, and access to the model hub is disabled "
            f"(HF_HUB_OFFLINE is set). {_where_to_get(name)}"
        )
    folder = _fetched(name, select)
    check(folder)
    return folder


def _refuse_unreadable(path: Path) -> None:
    """Raise ModelError for a path that cannot be looked up, such as in a folder of another user."""
    try:
        path.is_dir()
    except OSError as error:
        raise ModelError(
            f"{str(path)!r} cannot be read ({error.strerror}): make it readable for this user, or "
            "name another model"
        ) from error


def refuse_bytes(model: Path) -> None:
    """Raise ModelError for a path that is not UTF-8: tokenizers cannot be loaded from such a
    folder, and no store can record such a name."""
    path = os.path.abspath(model)
    if (printable := replace_surrogates(path)) != path:
        what = "folder" if model.is_dir() else "file"
        raise ModelError(
            f"the {what} of the model, {printable}, has a name that is not UTF-8, and cannot be "
            "loaded from. Rename it, or make a link to it under another name."
        )


def _refuse_paths(name: str, path: Path) -> None:
    """Raise ModelError for a name that cannot be a hub name (organisation/model, or model)."""
    if path.is_file():
        raise ModelError(
            f"{name} is a file, and a model is a folder with config.json, safetensors and "
            "tokenizer.json (a language model can be a GGUF file too): give the folder it is in"
        )
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"there is no file {name!r}: give the path of a GGUF file")
    separators = name.count("/") + name.count(os.sep if os.sep != "/" else "\\")
    meant = path.is_absolute() or name[:1] in {".", "~"} or separators > 1
    if not name or meant or (separators and path.parent.is_dir()):
        raise ModelError(
            f"there is no folder {name!r}: give the folder of a model, a GGUF file, or a name of "
            "the model hub such as Qwen/Qwen2.5-0.5B-Instruct; `tiny` is the small model that "
            "ships with ragcache"
        )


def _cached(name: str) -> Path | None:
    """The model's snapshot in the hub's cache, which may be incomplete; None without one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor a name of the model hub. {_where_to_get(name)}"
        ) from error


def _fetched(name: str, select: Callable[[Sequence[str]], list[str]]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        listed = HfApi().model_info(name, timeout=_LIST_TIMEOUT_S).siblings or []
        files = select([file.rfilename for file in listed])
        return Path(snapshot_download(name, allow_patterns=files))
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is a gated model: accept its terms at "
            f"https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r} here, and the model hub has no such model that this "
            f"user can access. {_where_to_get(name)}"
        ) from error
    except Exception as error:  # network errors, and those of proxies, can be of any class
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ModelError(
            f"the model {name} is not on this machine, and the model hub cannot be reached "
            f"({reason}). {_where_to_get(name)}"
        ) from error


def _where_to_get(name: str) -> str:
    return (
        "Name a folder with the model's files, or download them where there is a network: "
        f"hf download {name}. `tiny` is the small model that ships with ragcache."
    )
