"""Load the tokenizer and the model of a checkpoint with the transformers library.

A model's custom code is not run, no file is unpickled, nothing is read from standard input, and
nothing is downloaded. A missing tensor is an error, and is never initialised at random.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ragcache.errors import ModelError
from ragcache.models.checkpoint import CONFIG, Checkpoint, ModelConfig, read_json
from ragcache.models.silence import silence_transformers

__all__ = ["build_without_weights"]

logger = logging.getLogger(__name__)

_PLAIN = {"F64", "F32", "F16", "BF16"}  # safetensors' names of dtypes that are not quantised


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's fast tokenizer, with its chat template. Raises ModelError."""
    from transformers import AutoTokenizer

    with _refusing(checkpoint, "tokenizer"), silence_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint.folder), trust_remote_code=False, local_files_only=True
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{checkpoint.name} cannot be used: its tokenizer is not a fast one (tokenizer.json). "
            "Save it as such with transformers, or use another model."
        )
    return tokenizer


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model on the CPU, with all tensors from the checkpoint. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    described = dict(build_without_weights(checkpoint, dtype).named_parameters())
    _check_tensors(checkpoint, set(described))
    _check_size(checkpoint, sum(weight.numel() for weight in described.values()))
    with _refusing(checkpoint, "model"), silence_transformers(bar=sys.stderr.isatty()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, with a clearer error
            output_loading_info=True,
            local_files_only=True,
        )
    model, found = loaded
    wrong = sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{checkpoint.folder} lacks {len(wrong)} of the model's tensors, or has them in "
            f"another shape, such as {wrong[0]}: they would be random numbers. Download the "
            "model's files again."
        )
    if unused := sorted(found["unexpected_keys"]):
        logger.warning(
            "%d tensors of %s are not part of the model and are not loaded, such as %s.",
            *(len(unused), checkpoint.name, unused[0]),
        )
    return model


def build_without_weights(described: ModelConfig, dtype: torch.dtype | None = None) -> Any:
    """The model on torch's meta device: without weights, it takes no memory and cannot run.

    ``dtype``: None for that of the configuration. Raises ModelError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _refusing(described, "configuration"), silence_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            str(described.folder), trust_remote_code=False, local_files_only=True
        )
        given = {} if dtype is None else {"dtype": dtype}
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given)


def _check_tensors(checkpoint: Checkpoint, parameters: set[str]) -> None:
    """Raise ModelError for quantised weights, whether or not the configuration declares them."""
    from safetensors import safe_open

    for file in checkpoint.weights:
        with safe_open(file, "np") as opened:
            for name in sorted(parameters.intersection(opened.keys())):
                if (kind := opened.get_slice(name).get_dtype()) not in _PLAIN:
                    raise ModelError(
                        f"{file} has quantised weights ({name} is {kind}), which ragcache cannot "
                        "compute with. Use the model's weights in bfloat16, float16 or float32; "
                        "--codec int8 makes the stored KV small."
                    )


def _check_size(checkpoint: Checkpoint, described: int) -> None:
    """Raise ModelError if the configuration describes over twice the parameters of the files.

    Tensors that are not in the files, such as tied weights, are fewer than half of any model's.
    """
    from safetensors import safe_open

    there = 0
    for file in checkpoint.weights:
        with safe_open(file, "np") as opened:
            shapes = (opened.get_slice(name).get_shape() for name in opened.keys())
            there += sum(torch.Size(shape).numel() for shape in shapes)
    if described > 2 * there:
        raise ModelError(
            f"{checkpoint.folder / CONFIG} describes {described:,} parameters, but the files of "
            f"weights have {there:,}: they do not belong together. Download the model's files "
            "again."
        )


@contextmanager
def _refusing(checkpoint: ModelConfig, what: str) -> Iterator[None]:
    """Turn every exception into a ModelError: libraries raise any kind for damaged files."""
    try:
        yield
    except MemoryError as error:
        raise ModelError(
            f"the {what} of {checkpoint.name} does not fit this machine's memory: use a smaller "
            "model"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if code := _custom_code(checkpoint, what, reason):
            raise ModelError(
                f"{checkpoint.name} needs code of its own (auto_map in {code}), which ragcache "
                "never runs. Use a model of an architecture that transformers has."
            ) from error
        raise ModelError(
            f"cannot load the {what} in {checkpoint.folder}: {reason[:300]}. Download the model's "
            "files again, or use another model."
        ) from error


def _custom_code(checkpoint: ModelConfig, what: str, reason: str) -> str:
    """The file that names the model's custom code, if loading failed for lack of it, else ""."""
    from transformers import CONFIG_MAPPING

    if checkpoint.config.get("model_type") in CONFIG_MAPPING and "trust_remote_code" not in reason:
        return ""
    names = [CONFIG, "tokenizer_config.json"]
    for name in reversed(names) if what == "tokenizer" else names:
        file = checkpoint.folder / name
        if file.is_file() and read_json(file).get("auto_map"):
            return name
    return ""
