"""A cross-encoder with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

WORDS = "the river rose bridge gone ferryman missing boat of apples old mill lived in ? where is"


def make_cross_encoder(folder: Path, labels: int = 1, scale: float = 1.0) -> Path:
    """Make one that reads 32 tokens; returns its folder."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    config.num_labels = labels
    torch.manual_seed(3)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight *= scale
    model.save_pretrained(folder)
    return folder
