"""Check at start that vLLM's configuration is supported."""

from __future__ import annotations

from dataclasses import dataclass

from ragcache.errors import ConfigError

#: Tested releases of vLLM, whose connector interface changes without notice.
VERSIONS = ("0.32",)
#: Load formats that read the safetensors that the fingerprint is computed from.
_LOAD_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "instanttensor"}


@dataclass(frozen=True, slots=True)
class VllmSetup:
    """The configuration of a running vLLM."""

    version: str
    cache_dtype: str = "auto"  # of the KV cache
    kv_groups: int = 1
    mla: bool = False
    windows: bool = False  # whether a layer has a sliding window
    pipeline: int = 1  # stages of pipeline parallelism
    context: int = 1  # ranks of context parallelism
    lora: bool = False
    multimodal: bool = False
    quantization: str | None = None
    speculative: bool = False
    load_format: str = "auto"  # of the weights
    elsewhere: tuple[str, ...] = ()  # options that replace files of the model's folder


def check_vllm(setup: VllmSetup) -> None:
    """Raise ConfigError, with all reasons, if answers would be wrong."""
    wrong = [sentence for bad, sentence in _refusals(setup) if bad]
    if wrong:
        raise ConfigError(
            f"ragcache cannot work with this vLLM: {'; '.join(wrong)}. docs/vllm.md lists what is "
            "supported."
        )


def _refusals(setup: VllmSetup) -> list[tuple[bool, str]]:
    release = ".".join(setup.version.split(".")[:2])
    return [
        (
            release not in VERSIONS,
            f"its version is {setup.version}, and ragcache was tested with "
            f"{', '.join(VERSIONS)}: install one of these",
        ),
        (setup.mla, "the model's attention is MLA, whose KV is not keys and values"),
        (setup.windows, "the model has layers with a sliding window, whose pages vLLM frees"),
        (
            setup.kv_groups != 1,
            f"its KV cache has {setup.kv_groups} groups of layers, and a fused prompt needs one",
        ),
        (
            setup.multimodal,
            "the model takes images or sound, whose tokens have no KV in a store: start it with "
            "--language-model-only, or use a text model",
        ),
        (
            setup.lora,
            "adapters change the KV and have no fingerprint: start it without --enable-lora, with "
            "the adapter merged",
        ),
        (
            setup.quantization is not None,
            f"its weights are quantized ({setup.quantization}), so they are not those that the "
            "fingerprint is computed from",
        ),
        (
            setup.load_format not in _LOAD_FORMATS,
            f"its weights are read by load format {setup.load_format}, so they are not those that "
            "the fingerprint is computed from: start it with --load-format safetensors",
        ),
        (
            bool(setup.elsewhere),
            f"it was started with {', '.join(setup.elsewhere)}, but the fingerprint is computed "
            "from the model's own folder: put these files into the folder instead",
        ),
        (
            setup.cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
            f"its KV cache is {setup.cache_dtype}: start it with --kv-cache-dtype auto",
        ),
        (
            setup.pipeline != 1 or setup.context != 1,
            "its layers or its context are divided among stages: use tensor parallelism or "
            "replicas",
        ),
        (setup.speculative, "speculative decoding keeps KV of a second model, which is not stored"),
    ]
