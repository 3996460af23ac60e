"""Export a checkpoint to a folder that `LlamaForCausalLM.from_pretrained` reads."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .model import TinyConfig, TinyLlama
from .tokenizer import BOS, EOS, PAD


def config_of(weights: dict[str, Tensor]) -> TinyConfig:
    """The configuration that fits the weights (head size and RoPE base are the defaults)."""
    vocabulary, width = weights["embed_tokens.weight"].shape
    layers = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("layers."))
    size = TinyConfig().head_size
    return TinyConfig(
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        heads=weights["layers.0.self_attn.q_proj.weight"].shape[0] // size,
        kv_heads=weights["layers.0.self_attn.k_proj.weight"].shape[0] // size,
        hidden=weights["layers.0.mlp.gate_proj.weight"].shape[0],
    )


def load_exported(folder: Path) -> TinyLlama:
    """The shipped weights, in float32."""
    shipped = load_file(folder / "model.safetensors")
    weights = {k.removeprefix("model."): v.float() for k, v in shipped.items()}
    model = TinyLlama(config_of(weights))
    model.load_state_dict(weights)
    return model.eval()


def llama_config(config: TinyConfig) -> dict[str, object]:
    """config.json with the keys of both old and new versions of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rms_norm_eps": config.epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def export(run: Path, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16).

    ``run`` is the folder of a run, see ``Trainer.save``.
    """
    saved = load_file(run / json.loads((run / "run.json").read_text())["weights"])
    weights = {k[len("model.") :]: v for k, v in saved.items() if k.startswith("model.")}
    renamed = {f"model.{k}": v.to(torch.bfloat16).contiguous() for k, v in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    save_file(renamed, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "do_sample": False,
        "max_new_tokens": 16,
    }
    contents = {
        "config.json": llama_config(config_of(weights)),
        "generation_config.json": generation,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("build/tiny"))
    parser.add_argument("--folder", type=Path, default=Path("ragcache/models/tiny"))
    given = parser.parse_args()
    export(given.run, given.folder)


if __name__ == "__main__":
    main()
