"""Parts tokenised alone, compared with the whole text: ``python -m bench.tokenising --model NAME``.

A prompt's parts are tokenised one by one, so that a chunk has the same ids in every prompt. Other
engines tokenise the text that the chat template renders at once, and then a token may reach over
the boundary of two parts. This counts the prompts, and the tokens, whose ids differ, and names the
boundaries where they do.

Prompts: questions over chunks of the articles that ship with ragcache, chats with such chunks as
documents, chats with whole articles pasted into a message, and contexts of an agent, which are
edited (see ``bench.agent_context``).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from bench.agent_context import Repository, messages
from bench.edits import contexts
from bench.results import ROOT, commit, machine, table
from ragcache.core.prompting import PromptBuilder
from ragcache.core.request import Request
from ragcache.engine.chat_message import ChatMessage
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.template import chunk_text
from ragcache.eval.articles import ARTICLE_QUESTIONS, ARTICLES
from ragcache.models import model_path
from ragcache.retriever.split import Splitter
from ragcache.settings import Settings
from ragcache.types import Document, Prompt, Tokens

PROMPTS = 50  # of each kind
_DOCUMENTS = 6
_CHARS = 12_000  # most of an agent's context
_AGREE = 4  # tokens that must be equal where two tokenisations agree again
_REASONS = 6
_SYSTEM = "Answer in one sentence, and name the place that the question asks for."

#: The parts' ids, and the whole text.
_Pair = tuple[Prompt, str]


@dataclass
class Count:
    """What was compared."""

    prompts: int = 0
    differing_prompts: int = 0
    tokens: int = 0
    differing_tokens: int = 0
    boundaries: int = 0  # between two parts
    reasons: Counter[str] = field(default_factory=Counter)  # of runs of tokens that differ

    def cells(self) -> list[str]:
        each = (
            (self.differing_prompts, self.prompts),
            (self.differing_tokens, self.tokens),
            (self.reasons.total(), self.boundaries),
        )
        shares = (f"{some / max(1, every):.2%}" for some, every in each)
        return [f"{self.prompts}", f"{self.tokens:,}", *shares]


def compare(engine: TransformersEngine, pairs: Iterator[_Pair]) -> Count:
    """Count where the parts' ids differ from those of the whole text."""
    count = Count()
    for prompt, text in pairs:
        whole = engine.tokenize(text, control=True)
        found = differences(prompt.tokens, whole)
        count.prompts += 1
        count.differing_prompts += bool(found)
        count.tokens += len(prompt)
        count.differing_tokens += sum(max(b - a, d - c) for a, b, c, d in found)
        count.boundaries += len(prompt.parts) - 1
        count.reasons.update(reason(engine, prompt, start, stop) for start, stop, *_ in found)
    return count


def differences(one: Tokens, other: Tokens) -> list[tuple[int, int, int, int]]:
    """The ranges of both that differ, in order. Between them, both have the same tokens."""
    found = []
    a = c = 0
    while a < len(one) or c < len(other):
        if one[a : a + 1] == other[c : c + 1]:
            a, c = a + 1, c + 1
            continue
        b, d = _agreement(one, other, a, c)
        found.append((a, b, c, d))
        a, c = b, d
    return found


def _agreement(one: Tokens, other: Tokens, a: int, c: int) -> tuple[int, int]:
    """The nearest places from which on a few tokens of both are equal, or the ends of both."""
    for more in range(1, len(one) - a + len(other) - c):
        for right in range(max(0, more - len(one) + a), min(more, len(other) - c) + 1):
            b, d = a + more - right, c + right
            if one[b : b + _AGREE] == other[d : d + _AGREE]:
                return b, d
    return len(one), len(other)


def reason(engine: TransformersEngine, prompt: Prompt, start: int, stop: int) -> str:
    """The boundary that the tokens from ``start`` to ``stop`` differ at, in words."""
    for number, (edge, _) in enumerate(prompt.part_spans):
        if number and start <= edge <= stop:
            before, after = prompt.parts[number - 1 : number + 1]
            ends = "".join(engine.pieces(before.tokens[-8:]))
            begins = "".join(engine.pieces(after.tokens[:8]))
            kinds = ["chunk" if part.is_chunk else "text" for part in (before, after)]
            blank = ends[len(ends.rstrip()) :] or ends[-1:]
            space = begins[: len(begins) - len(begins.lstrip())]
            return f"{kinds[0]} ends {_shown(blank)}, {kinds[1]} begins {_shown(space or begins)}"
    return "inside a part"


def _shown(text: str) -> str:
    """Whitespace as it is; of other characters, what they are."""
    if not text or text.isspace():
        return repr(text[:4])
    return "with a letter or digit" if text[0].isalnum() else "with another sign"


def kinds(engine: TransformersEngine, prompts: int) -> Mapping[str, Callable[[], Iterator[_Pair]]]:
    """The kinds of prompts."""
    articles = {path.name: path.read_text(encoding="utf-8") for path in ARTICLES.glob("*.md")}
    split = Splitter(lambda text: len(engine.tokenize(text)), 256)
    chunks = [
        chunk.text
        for name, text in sorted(articles.items())
        for chunk in split.chunks(Document(name, text))
    ]
    builder = PromptBuilder(engine, engine.template, find_chars=Settings.load().find_chars)
    asked = [known.question.text for known in ARTICLE_QUESTIONS]

    def drawn(number: int) -> tuple[str, list[str]]:
        random = Random(number)
        return random.choice(asked), random.sample(chunks, _DOCUMENTS)

    def of_chat(chat: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> _Pair:
        request = Request(messages=chat)
        prompt, _ = builder.build(request, (), builder.read(chat, None))
        whole = [ChatMessage.of(one["role"], one["content"]) for one in plain]
        return prompt, engine.chat_template().render(whole).text

    def questions() -> Iterator[_Pair]:
        for number in range(prompts):
            question, documents = drawn(number)
            template = engine.template
            text = "".join(map(chunk_text, documents)) + f"Question: {question}"
            yield template.prompt(documents, question), template.before + text + template.after

    def with_documents() -> Iterator[_Pair]:
        for number in range(prompts):
            question, documents = drawn(number)
            turn, said = drawn(number + prompts)
            before = [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": turn},
                {"role": "assistant", "content": said[0].strip()},
            ]
            given = [{"type": "chunk", "text": one} for one in documents]
            text = "".join(map(chunk_text, documents)) + question
            yield of_chat(
                [*before, {"role": "user", "content": [*given, question]}],
                [*before, {"role": "user", "content": text}],
            )

    def pasted() -> Iterator[_Pair]:
        for number in range(prompts):
            random = Random(number)
            texts = [articles[name] for name in random.sample(sorted(articles), 2)]
            text = "\n\n".join([*texts, random.choice(asked)])
            chat = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]
            yield of_chat(chat, chat)

    def agent() -> Iterator[_Pair]:
        repository = Repository.at(ROOT)
        made = contexts(
            repository, 0, prompts - 1, lambda c: sum(len(b.text + b.said) for b in c), _CHARS
        )
        for context, _, _ in made:
            chat = messages(context)
            yield of_chat(chat, chat)

    return {
        "questions over chunks": questions,
        "chats with documents": with_documents,
        "articles in a message": pasted,
        "an agent's context": agent,
    }


def shown(found: Mapping[tuple[str, str], Count]) -> str:
    """The table of all counts, and those of the most frequent reasons."""
    heads = ["model", "prompts", "number", "tokens", "prompts differ", "tokens differ"]
    rows = [[*names, *count.cells()] for names, count in found.items()]
    lines = [table([*heads, "boundaries differ"], rows)]
    for model in dict.fromkeys(model for model, _ in found):
        reasons: Counter[str] = Counter()
        for (name, _), count in found.items():
            reasons.update(count.reasons if name == model else {})
        most = reasons.most_common(_REASONS)
        if most:
            every = reasons.total()
            shares = [[where, f"{number / every:.0%}"] for where, number in most]
            lines.append(table([f"{model}: where {every:,} differences are", "share"], shares))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, action="append", help="name, folder or GGUF file")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each kind")
    given = parser.parse_args()
    found = {}
    for name in given.model:
        engine = TransformersEngine.load(model_path(name))
        for kind, made in kinds(engine, given.prompts).items():
            found[name, kind] = compare(engine, made())
    print(f"{shown(found)}\n`python {shlex.join(sys.orig_argv[1:])}` on {machine()}; {commit()}")


if __name__ == "__main__":
    main()
