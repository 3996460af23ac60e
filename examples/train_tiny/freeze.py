"""Write the frozen held-out prompts and the demo corpus that ship with the model."""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from .world import Binding, Document, Prompt, Question, Shape, World

FREEZE_SEED = 90_000_001


def pick(questions: list[Question], quota: dict[Binding, int]) -> list[Question]:
    """The first questions of every kind, up to its quota, in their own random order."""
    left = dict(quota)
    picked = []
    for question in questions:
        if left.get(question.binding, 0) > 0:
            left[question.binding] -= 1
            picked.append(question)
    return picked


def record(question: Question) -> dict[str, object]:
    return {
        "question": question.text,
        "answers": [question.answer],
        "kind": question.binding,
    }


def prompt_lines(
    seed: int, documents: int, contexts: int, quota: dict[Binding, int]
) -> Iterable[str]:
    """One JSON line per context."""
    world, rng = World("held_out"), random.Random(seed)
    for _ in range(contexts):
        shape = Shape((documents, documents), one_kind=0.25, link=0.7)
        prompt = world.prompt(rng, shape, 10_000)
        questions = [record(q) for q in pick(prompt.questions, quota)]
        line = {"documents": documents, "chunks": prompt.chunks, "questions": questions}
        yield json.dumps(line, ensure_ascii=False)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def corpus(seed: int, documents: int) -> Prompt:
    """One big prompt: its names are unique over all documents."""
    shape = Shape((documents, documents), one_kind=0.0, link=0.6)
    return World("held_out").prompt(random.Random(seed), shape, 10_000)


def document_lines(prompt: Prompt) -> Iterable[str]:
    for document in prompt.documents:
        text = "\n\n".join(document.chunks)
        yield json.dumps({"id": slug(document.name), "text": text}, ensure_ascii=False)


def about(question: Question, documents: list[Document]) -> Document:
    """The document whose name the question says."""
    return next(document for document in documents if document.name in question.text)


def question_lines(prompt: Prompt) -> Iterable[str]:
    """One question about each document; kinds take turns as far as a document has them."""
    turns: list[Binding] = ["hop", "split", "direct", "local", "split"]
    by_document: dict[str, list[Question]] = {}
    for question in prompt.questions:
        if question.binding != "hopsplit":
            name = about(question, prompt.documents).name
            by_document.setdefault(name, []).append(question)
    for i, document in enumerate(prompt.documents):
        wanted = turns[i % len(turns)]
        candidates = by_document[document.name]
        chosen = next((q for q in candidates if q.binding == wanted), candidates[0])
        line = {**record(chosen), "document": slug(document.name)}
        yield json.dumps(line, ensure_ascii=False)


def write(folder: Path) -> dict[str, str]:
    """Write the four files; their sha256 by name."""
    each: dict[Binding, int] = {"direct": 9, "local": 9, "split": 10, "hop": 8}
    many: dict[Binding, int] = {"direct": 11, "local": 11, "split": 11, "hop": 11}
    demo = corpus(FREEZE_SEED + 2, 60)
    files = {
        "prompts.jsonl": prompt_lines(FREEZE_SEED, 8, 140, each),
        "prompts16.jsonl": prompt_lines(FREEZE_SEED + 1, 16, 24, many),
        "documents.jsonl": document_lines(demo),
        "questions.jsonl": question_lines(demo),
    }
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for name, lines in files.items():
        data = "".join(line + "\n" for line in lines).encode()
        (folder / name).write_bytes(data)
        sums[name] = hashlib.sha256(data).hexdigest()
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("ragcache/models/tiny/world"))
    for name, digest in write(parser.parse_args().folder).items():
        print(digest, name)


if __name__ == "__main__":
    main()
