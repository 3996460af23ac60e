"""From a checkpoint to a tokenizer and a model of the transformers library.

Nothing that comes with a model is run or unpickled, nothing is asked on standard input, and every
file is on this machine already. What a model lacks is an error, never a random number.
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

logger = logging.getLogger(__name__)

_PLAIN = {"F64", "F32", "F16", "BF16"}  # as safetensors name them


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
    """The model, on the CPU, every one of its tensors from the checkpoint. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    described = dict(outline(checkpoint, dtype).named_parameters())
    _check_tensors(checkpoint, set(described))
    _check_size(checkpoint, sum(weight.numel() for weight in described.values()))
    with _refusing(checkpoint, "model"), silence_transformers(bar=sys.stderr.isatty()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are told, and refused below
            output_loading_info=True,
            local_files_only=True,
        )
    model, found = loaded
    wrong = sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{checkpoint.folder} lacks {len(wrong)} of the model's tensors, or has them in "
            f"another shape, {wrong[0]} for one: they would be random numbers. Get the model's "
            "files anew."
        )
    if unused := sorted(found["unexpected_keys"]):
        logger.warning(
            "%d tensors of %s are no part of the model and are left out, %s for one.",
            *(len(unused), checkpoint.name, unused[0]),
        )
    return model


def outline(described: ModelConfig, dtype: torch.dtype | None = None) -> Any:
    """The model without its weights: it takes no memory, and cannot run. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _refusing(described, "configuration"), silence_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            str(described.folder), trust_remote_code=False, local_files_only=True
        )
        given = {} if dtype is None else {"dtype": dtype}  # else the configuration's own
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given)


def _check_tensors(checkpoint: Checkpoint, parameters: set[str]) -> None:
    """Raise ModelError for weights that are no plain numbers, and mean nothing without the scales
    beside them, whether or not the configuration says that they are quantised."""
    from safetensors import safe_open

    for file in checkpoint.weights:
        with safe_open(file, "np") as opened:
            for name in sorted(parameters.intersection(opened.keys())):
                if (kind := opened.get_slice(name).get_dtype()) not in _PLAIN:
                    raise ModelError(
                        f"{file} has quantised weights ({name} is {kind}), which ragcache does not "
                        "compute with. Take the model's own weights in bfloat16, float16 or "
                        "float32; --codec int8 makes the stored KV small."
                    )


def _check_size(checkpoint: Checkpoint, described: int) -> None:
    """Raise ModelError where the configuration needs memory for far more than the files hold.

    Tensors that a model makes for itself are no half of any.
    """
    from safetensors import safe_open

    there = 0
    for file in checkpoint.weights:
        with safe_open(file, "np") as opened:
            shapes = (opened.get_slice(name).get_shape() for name in opened.keys())
            there += sum(torch.Size(shape).numel() for shape in shapes)
    if described > 2 * there:
        raise ModelError(
            f"{checkpoint.folder / CONFIG} describes {described:,} parameters, and the files of "
            f"weights have {there:,}: they do not belong together. Get the model's files anew."
        )


@contextmanager
def _refusing(checkpoint: ModelConfig, what: str) -> Iterator[None]:
    """Whatever goes wrong within is a ModelError: libraries raise all kinds for damaged files."""
    try:
        yield
    except MemoryError as error:
        raise ModelError(
            f"the {what} of {checkpoint.name} does not fit this machine's memory: use a smaller "
            "model"
        ) from error
    except Exception as error:  # of a damaged or foreign file: it may be of any kind
        said = " ".join(str(error).split()) or type(error).__name__
        if code := _own_code(checkpoint, what, said):
            raise ModelError(
                f"{checkpoint.name} brings code of its own (auto_map in {code}), which ragcache "
                "never runs, and transformers cannot load it without. Use a model that "
                "transformers knows."
            ) from error
        raise ModelError(
            f"cannot load the {what} in {checkpoint.folder}: {said[:300]}. Get the model's files "
            "anew, or use another model."
        ) from error


def _own_code(checkpoint: ModelConfig, what: str, said: str) -> str:
    """The file that names code of the model's own, if that code is what was missed."""
    from transformers import CONFIG_MAPPING

    if checkpoint.config.get("model_type") in CONFIG_MAPPING and "trust_remote_code" not in said:
        return ""
    names = [CONFIG, "tokenizer_config.json"]
    for name in reversed(names) if what == "tokenizer" else names:
        file = checkpoint.folder / name
        if file.is_file() and read_json(file).get("auto_map"):
            return name
    return ""
