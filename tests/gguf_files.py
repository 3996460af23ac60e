"""Write small GGUF files, as llama.cpp's converter does from a model of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import models

pytest.importorskip("gguf", reason="needs the extra gguf")

from gguf import GGMLQuantizationType, GGUFWriter, quantize  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_NAMES = {
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"lm_head": "output",
    r"model\.layers\.(\d+)\.": r"blk.\1.",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.o_proj": "attn_output",
    r"mlp\.(\w+)_proj": r"ffn_\1",
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ffn_norm",
}
Change = Callable[[GGUFWriter, dict[str, np.ndarray]], object]


def write(
    file: Path,
    architecture: str = "llama",
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: bool = True,
    change: Change | None = None,
    fields: Mapping[str, str] | None = None,
    **config: Any,
) -> Any:
    """Write ``models.model(architecture, **config)`` and its tokenizer; returns the model.

    ``kind``: of matrices. ``change`` is called before the file is written, with the writer and the
    tensors by their names. ``fields``: more fields of text.
    """
    model = models.model(architecture, **config)
    writer = GGUFWriter(file, architecture)
    _describe(writer, model.config)
    if tokenizer:
        _write_tokenizer(writer)
    for key, text in (fields or {}).items():
        writer.add_string(key, text)
    tensors = {gguf_name(name): t.numpy() for name, t in _tensors(model).items()}
    if change is not None:
        change(writer, tensors)
    for name, tensor in tensors.items():
        used = kind if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_name(name: str) -> str:
    for pattern, ours in _NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def _describe(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Any) -> dict[str, Any]:
    """The model's tensors; rows of q and k in llama.cpp's order, in which RoPE's pairs are side by
    side."""
    found = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    for name, tensor in found.items():
        if model.config.model_type == "llama" and re.search(r"[qk]_proj\.weight", name):
            heads = model.config.num_attention_heads
            heads = model.config.num_key_value_heads if "k_proj" in name else heads
            rows = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2)
            found[name] = rows.reshape(tensor.shape).contiguous()
    return found


def _write_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = models.tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
