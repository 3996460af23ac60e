"""The byte-level BPE tokenizer, trained on text that the training world writes."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .world import Shape, World

VOCABULARY = 2048
PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
PREFIX = "Use the notes to answer the question.\n\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)


def chunk_text(chunk: str) -> str:
    return chunk + "\n\n"


def question_text(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def answer_text(answer: str) -> str:
    return " " + answer


def corpus(seed: int, prompts: int) -> Iterator[str]:
    """Training text, part by part, just as the parts are tokenised later."""
    world, rng = World("train"), random.Random(seed)
    for _ in range(prompts):
        prompt = world.prompt(rng, Shape(), 24)
        yield PREFIX
        yield from (chunk_text(chunk) for chunk in prompt.chunks)
        for question in prompt.questions:
            yield question_text(question.text)
            yield answer_text(question.answer)


def train_tokenizer(seed: int = 0, prompts: int = 3000) -> Tokenizer:
    """Names that training never shows are never whole tokens: they fall into known pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, prompts), trainer)
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(max_length), indent=2)
    (folder / "tokenizer_config.json").write_text(config + "\n")
