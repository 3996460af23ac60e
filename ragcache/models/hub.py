"""Where a model's files are: in a folder that was named, or in the model hub's cache.

Everything is loaded from a folder, so what was loaded is known, file by file. What the cache has
whole is used as it is, and the hub is asked for nothing: that works without a network, and a model
does not change under its store. `hf download NAME` brings a newer one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ragcache.errors import ModelError
from ragcache.text import replace_surrogates

#: Seconds that the hub may take to say what it has.
_PATIENCE_S = 10


def find_model_folder(
    name: str, check: Callable[[Path], object], wanted: Callable[[Sequence[str]], list[str]]
) -> Path:
    """The folder of the model ``name``: a folder or hub name.

    ``check`` raises ModelError for a folder that cannot be loaded from; ``wanted`` names, of all
    files that the hub has of the model, those to bring, and raises ModelError where it has nothing
    that can be loaded. Raises ModelError where there is no such model, and what ``check`` raises.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_bytes(path)
        check(path)
        return path
    _refuse_paths(name, path)
    folder, problem = _cached(name), None
    if folder is not None:
        try:
            check(folder)
            return folder
        except ModelError as error:  # it may be there in part
            problem = error
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise problem or ModelError(
            f"the model {name} is not on this machine, and the model hub may not be asked "
            f"(HF_HUB_OFFLINE is set). {_places(name)}"
        )
    folder = _fetched(name, wanted)
    check(folder)
    return folder


def _refuse_bytes(folder: Path) -> None:
    """Raise ModelError where a path is no text: nothing that loads a tokenizer takes it."""
    path = os.path.abspath(folder)
    if (printable := replace_surrogates(path)) != path:
        raise ModelError(
            f"the folder of the model, {printable}, has a name that is not UTF-8, and cannot be "
            "loaded from. Rename it, or make a link to it under another name."
        )


def _refuse_paths(name: str, path: Path) -> None:
    """Raise ModelError for what cannot be a name of the hub: organisation/model, or model."""
    if path.is_file():
        raise ModelError(
            f"{name} is a file, and a model is a folder with config.json, safetensors and "
            f"tokenizer.json: {gguf_advice(name) or 'give the folder it is in'}"
        )
    separators = name.count("/") + name.count(os.sep if os.sep != "/" else "\\")
    meant = path.is_absolute() or name[:1] in {".", "~"} or separators > 1
    if not name or meant or (separators and path.parent.is_dir()):
        raise ModelError(
            f"there is no folder {name!r}: give the folder of a model, or a name of the model hub "
            "such as Qwen/Qwen2.5-0.5B-Instruct; `tiny` is the small model that ships with ragcache"
        )


def gguf_advice(*names: str) -> str:
    """What to do about GGUF files, or "" where there are none."""
    for path in map(Path, names):
        if path.suffix.lower() == ".gguf":
            return (
                f"{path.name} is GGUF, which this release cannot read (a later one may). Take the "
                "same model as safetensors, or make that of it: in Python, load and save it with "
                f"transformers, M.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r})"
                ".save_pretrained(FOLDER) for M = AutoModelForCausalLM and AutoTokenizer"
            )
    return ""


def _cached(name: str) -> Path | None:
    """The snapshot of the model that the hub's cache has, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor a name of the model hub. {_places(name)}"
        ) from error


def _fetched(name: str, wanted: Callable[[Sequence[str]], list[str]]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        listed = HfApi().model_info(name, timeout=_PATIENCE_S).siblings or []
        files = wanted([file.rfilename for file in listed])
        return Path(snapshot_download(name, allow_patterns=files))
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"the model hub gives {name} only to who has asked for it: accept its terms at "
            f"https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r} here, and the model hub has no such model that this "
            f"user may see. {_places(name)}"
        ) from error
    except Exception as error:  # of a network, or of what answers in the hub's place: of any kind
        said = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ModelError(
            f"the model {name} is not on this machine, and the model hub cannot be asked for it "
            f"({said}). {_places(name)}"
        ) from error


def _places(name: str) -> str:
    return (
        "Name a folder with the model's files, or bring them where there is a network: "
        f"hf download {name}. `tiny` is the small model that ships with ragcache."
    )
