"""Use a GGUF file as a model: convert it once into a folder of safetensors in the user's cache.

The folder is in ``$XDG_CACHE_HOME/ragcache/gguf`` (``~/.cache/ragcache/gguf``), and has the weights
in float32, the tokenizer and the chat template as transformers' own GGUF loader reads them. It is
loaded like every other model, and can be deleted at any time.
"""

from __future__ import annotations

import copy
import fcntl
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from ragcache.errors import ModelError
from ragcache.models.file_cache import cached_text, content_digest, file_identity, user_folder
from ragcache.models.gguf_header import GgufHeader
from ragcache.models.memory import ensure_unchanged
from ragcache.models.silence import silence_transformers

logger = logging.getLogger(__name__)

_CONVERSION = "1"  # increased when the same file is converted into other files
_COMPLETE = "content.blake3"  # digest of the other files of a converted folder, written last
_MARGIN_BYTES = 256 << 20  # free space beside the weights: tokenizer, file system
_LINE_S = 10  # between two lines of progress, where there is no terminal
_CONVERTING = threading.Lock()  # transformers' progress bar is replaced during a conversion


def converted_folder(file: Path) -> Path:
    """The folder with the converted model of a GGUF file.

    It is made on the first call, and again if its files were changed. Of several processes, one
    converts, and the others wait. Raises ModelError for a file that cannot be used, and if the
    folder cannot be written.
    """
    GgufHeader.check_file(file)
    folder = user_folder("XDG_CACHE_HOME", ".cache") / "gguf" / _key(file)
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder.with_name(f"{folder.name}.lock"), file):
            if not _is_complete(folder):  # another process may have made it meanwhile
                _make(file, folder)
    except OSError as error:
        raise ModelError(
            f"{file.name} cannot be converted into {folder.parent} ({error.strerror or error}): "
            "set XDG_CACHE_HOME to a folder that can be written and has room"
        ) from error
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file into ``folder``: float32 safetensors and tokenizer.json.

    Nothing but the file is read. Raises ModelError, and OSError if the folder cannot be written.
    """
    header = GgufHeader.read(file)
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(header, folder)
    with _CONVERTING, silence_transformers():
        # Other files beside it, such as config.json, would be read too.
        source = folder / "source"
        source.mkdir()
        (source / "model.gguf").symlink_to(file.resolve())
        try:
            _convert(header, source, folder)
        finally:
            shutil.rmtree(source)


def _convert(header: GgufHeader, source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {
        "gguf_file": "model.gguf",
        "trust_remote_code": False,
        "local_files_only": True,
    }
    with header.refusing("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(source), **given)
    with header.refusing("configuration"), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(source), **given)
        described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    header.check_config(config.to_dict(), sum(part.numel() for part in described.parameters()))
    with header.refusing("model"), _showing_progress(header.file.name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, with a clearer error
            output_loading_info=True,
            **given,
        )
    model, found = loaded
    wrong = sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{header.file} lacks {len(wrong)} of the model's tensors, or has them in another "
            f"shape, such as {wrong[0]}: they would be random numbers. Download it again, or use "
            "another file."
        )
    _report_unread(header, model)
    plain = _plain(model)
    try:
        tokenizer.save_pretrained(str(folder))
        plain.save_pretrained(str(folder))
    except Exception as error:  # such as SafetensorError, for a full disk
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error


def _report_unread(header: GgufHeader, model: Any) -> None:
    """Warn of tensors in the file that are not in the model."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    read = sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())
    if read < header.parameters:
        known = get_gguf_hf_weights_map(model, TensorProcessor())
        unread = [name for name in header.tensors if name not in known]
        logger.warning(
            "%d of %d numbers in %s are not part of the model and are not read, such as %s.",
            *(header.parameters - read, header.parameters, header.file.name),
            unread[0] if unread else "parts of tensors",
        )


def _plain(loaded: Any) -> Any:
    """The same model without the mark of quantisation, with which it could not be saved."""
    import torch

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("_name_or_path", "_model_name_or_path"):  # the file's name does not matter
        vars(config).pop(name, None)
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _key(file: Path) -> str:
    """Name of the folder for a file's content, this conversion, and transformers' version."""

    def read() -> str:
        return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()

    content = cached_text("gguf", file_identity([file]), read)
    made_by = f"{content}|{_CONVERSION}|{version('transformers')}"
    return blake3(made_by.encode()).hexdigest()[:32]


def _make(file: Path, folder: Path) -> None:
    """Convert into a folder beside, and rename it, so that ``folder`` is never half-written."""
    part = folder.with_name(f"{folder.name}.part")
    for left in (part, folder):  # of a conversion that was killed, or damaged later
        if left.is_symlink() or left.is_file():
            left.unlink()
        elif left.exists():
            shutil.rmtree(left)
    began = time.perf_counter()
    logger.warning("converting %s, once, into %s", file.name, folder)
    try:
        with ensure_unchanged(file.parent, [file]):
            if _key(file) != folder.name:  # replaced while this process waited for another one
                raise ModelError(f"{file} was changed while it was read: start again")
            convert_gguf(file, part)
        (part / _COMPLETE).write_text(content_digest(part, _files(part)))
        for written in (*part.iterdir(), part):
            _flush(written)
        part.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    logger.warning("converted %s in %.0f s", file.name, time.perf_counter() - began)


def _is_complete(folder: Path) -> bool:
    """Whether the folder has the files that were written into it, unchanged."""
    with suppress(OSError, ValueError):
        digest = (folder / _COMPLETE).read_text(encoding="ascii")
        return content_digest(folder, _files(folder)) == digest
    return False


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name != _COMPLETE]


def _flush(path: Path) -> None:
    """Write a file or folder through to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _locked(lock: Path, file: Path) -> Iterator[None]:
    """Hold the lock, which a killed process releases; say so if another process has it."""
    with lock.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that converts %s", file.name)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _check_room(header: GgufHeader, folder: Path) -> None:
    """Raise ModelError if the weights in float32 do not fit the file system."""
    needed, free = 4 * header.parameters + _MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{header.file.name} has {header.parameters:,} parameters, and converting it takes "
            f"{needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free: make "
            "room, or set XDG_CACHE_HOME to a folder that has it"
        )


@contextmanager
def _showing_progress(name: str) -> Iterator[None]:
    """Show transformers' progress in a terminal as a bar, and as lines elsewhere."""
    loader: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    def shown(tensors: Sequence[Any], **_: object) -> Any:
        if not logger.isEnabledFor(logging.WARNING):
            return tensors
        if sys.stderr.isatty():
            return before(tensors, desc=f"converting {name}", unit=" tensors", leave=False)
        return _in_lines(tensors, name)

    before = loader.tqdm
    loader.tqdm = shown
    try:
        yield
    finally:
        loader.tqdm = before


def _in_lines(tensors: Sequence[Any], name: str) -> Iterator[Any]:
    last = time.monotonic()
    for number, tensor in enumerate(tensors):
        if time.monotonic() - last > _LINE_S:
            last = time.monotonic()
            logger.warning("converting %s: %d of %d tensors", name, number, len(tensors))
        yield tensor
