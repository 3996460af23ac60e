"""Small random models and a tokenizer for tests: they need no files and load quickly."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from ragcache.engine.hf.engine import TransformersEngine

#: The text that the tokenizer is trained on.
TEXT = [
    "The river Avon runs past the old mill in Bexley.",
    "Mira Holt keeps a parrot and plays the cello.",
    "She was born in Oslo, where her father built boats.",
    "Question: Where does she live? Answer: in a small town by the sea.",
    "Use the notes to answer the question.",
]


@cache
def tokenizer(size: int = 400) -> Any:
    """A byte-level BPE of a few hundred ids with BOS, EOS and no chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def model(
    architecture: str = "llama", *, seed: int = 0, attention: str = "", **changes: Any
) -> Any:
    """A random model of four narrow layers, with windows of 16 where it has sliding ones.

    ``architecture`` is a ``model_type`` of transformers; ``attention`` its implementation, such as
    ``eager``; ``changes`` are fields of its configuration.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture in {"gemma2", "gemma3_text", "cohere2", "gpt_oss", "mistral"}:
        sizes["sliding_window"] = 16
    if "moe" in architecture or architecture in {"mixtral", "gpt_oss"}:
        sizes |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 32} if architecture == "qwen3_moe" else {}
    config = CONFIG_MAPPING[architecture](**(sizes | changes))
    if attention:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # with the default initialisation, attention is nearly uniform
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
    return made


def engine(architecture: str = "llama", **changes: Any) -> TransformersEngine:
    """An engine over :func:`model` and :func:`tokenizer`; ``changes`` as for :func:`model`."""
    return TransformersEngine(model(architecture, **changes), tokenizer(), name=architecture)
