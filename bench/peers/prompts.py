"""RAG prompts over real text: each has other chunks in another order, drawn from one pool."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from bench.results import ROOT
from ragcache.engine.plain_text import PlainText
from ragcache.engine.template import SEPARATOR, PromptTemplate, split_chat_template
from ragcache.eval.dataset import load_dataset
from ragcache.retriever.split import Splitter
from ragcache.types import Document, Prompt, Tokens

CHUNK = 256  # tokens at most
PAGES = "concepts", "fusion", "storage", "serving", "choosing-a-ratio", "reliability"
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """A prompt, and the same chunks in the same order with another question."""

    prompt: Prompt
    again: Prompt


@dataclass(frozen=True)
class Workload:
    text: str  # where the text is from
    prefix: Tokens
    pool: list[Tokens]  # every chunk that occurs
    warm: list[Prompt]  # asked before the measurement
    asked: list[Asked]


@dataclass(frozen=True)
class Source:
    """Chunks, and questions with the numbers of the chunks that they are about."""

    name: str
    chunks: list[str]
    questions: list[tuple[str, tuple[int, ...]]]


def from_docs(template: PromptTemplate, pages: Sequence[str] = PAGES) -> Source:
    """The chunks of this project's pages; a question per chunk that begins a section."""
    splitter = Splitter(
        lambda text: len(template.tokenize(text.strip() + SEPARATOR)), CHUNK, tokenizer_name="peers"
    )
    chunks: list[str] = []
    questions: list[tuple[str, tuple[int, ...]]] = []
    for page in pages:
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        document = Document(page, text, {"format": "markdown"})
        for chunk in splitter.split(document):
            if heading := _HEADING.search(chunk.text):
                title = heading[1].replace("`", "")
                asked = f'What do the notes say about "{title}"? Answer in one sentence.'
                questions.append((asked, (len(chunks),)))
            chunks.append(chunk.text)
    return Source(f"docs/ of this project ({', '.join(pages)})", chunks, questions)


def from_dataset(path: Path) -> Source:
    """The chunks of a data set, as :func:`ragcache.eval.dataset.load_dataset` reads it."""
    numbers: dict[str, int] = {}
    questions = []
    for context in load_dataset(path):
        own = tuple(numbers.setdefault(chunk, len(numbers)) for chunk in context.chunks)
        questions += [(question.text, own) for question in context.questions]
    return Source(path.name, list(numbers), questions)


def workload(
    source: Source, template: PromptTemplate, *, count: int, tokens: int, pool: int, seed: int = 0
) -> Workload:
    """``count`` prompts of up to ``tokens`` tokens, and one to warm up.

    The questions are drawn first. The pool is what they are about, and other chunks until it has
    ``pool`` of them or, where the questions need more, as many as these. A prompt has the chunks of
    its question and others of the pool, in random order. Raises ValueError if there are too few
    questions.
    """
    rng = random.Random(seed)
    if len(source.questions) < count + 2:
        raise ValueError(
            f"{source.name} has {len(source.questions)} questions, but {count} prompts need "
            f"{count + 2}: ask for fewer prompts, or give a larger source"
        )
    drawn = rng.sample(source.questions, count + 2)
    near = list(dict.fromkeys(n for _, own in drawn for n in own))
    far = [n for n in range(len(source.chunks)) if n not in set(near)]
    chosen = near + rng.sample(far, min(len(far), max(0, pool - len(near))))
    ids = {n: template.chunk(source.chunks[n]) for n in chosen}

    def prompt(question: str, own: Sequence[int], others: str) -> tuple[Prompt, Prompt]:
        asked, again = template.question(question), template.question(others)
        room = tokens - len(template.prefix) - max(len(asked), len(again))
        order, taken = [*own, *rng.sample(chosen, len(chosen))], list[int]()
        for n in dict.fromkeys(order):
            if len(ids[n]) <= room:
                taken.append(n)
                room -= len(ids[n])
        rng.shuffle(taken)
        chunks = tuple(ids[n] for n in taken)
        return Prompt.of(template.prefix, chunks, asked), Prompt.of(template.prefix, chunks, again)

    pairs = [
        prompt(question, own, drawn[(number + 1) % len(drawn)][0])
        for number, (question, own) in enumerate(drawn[: count + 1])
    ]
    return Workload(
        source.name,
        template.prefix,
        list(ids.values()),
        [first for first, _ in pairs[:1]],
        [Asked(first, again) for first, again in pairs[1:]],
    )


def load_template(model: Path) -> tuple[PromptTemplate, Tokenizer]:
    """The model's prompt template, as the engine makes it, and its tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    plain = PlainText(tokenizer, model.name)

    def tokenize(text: str, *, control: bool = False) -> Tokens:
        if not control:
            return plain.tokens(text)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    return split_chat_template(tokenizer, tokenize), tokenizer.backend_tokenizer


def end_tokens(model: Path) -> set[int]:
    """The ids that end an answer of the model."""
    given = GenerationConfig.from_pretrained(model).eos_token_id
    return set(given) if isinstance(given, list) else {given}
