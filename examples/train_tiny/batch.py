"""Prompts to tensors: one row holds a context and many independent questions."""

from dataclasses import dataclass, field, replace

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from .tokenizer import BOS, EOS, PAD, PREFIX, answer_text, chunk_text, question_text
from .world import BINDINGS, Prompt, Question, Spot

EMPTY = (PAD, 0, -1, -1, 0)  # a question token that is none, see `Row.ask`
Pair = tuple[int, int, int]  # (row of the batch, attending token, attended token)
GROUP = 128  # question tokens that attend to the context together
JOBS = ("bind", "name", "fact", "mark", "answer")  # what the guided heads do, see guide.py


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens 0..C-1 of a row are prefix and chunks, C.. are its questions one after another.

    The Q question tokens are groups of W; no question goes over the end of its group.
    """

    ids: Tensor  # (batch, C + Q)
    positions: Tensor  # (batch, C + Q); every question starts right after its context
    chunk: Tensor  # (batch, C): 0 prefix, 1.. chunks, -1 padding
    question: Tensor  # (batch, Q): 0.. questions, -1 padding
    targets: Tensor  # (batch, Q): next token where it is part of an answer, else -1
    kinds: Tensor  # (batch, Q): index into BINDINGS
    guides: dict[str, list[Pair]]  # per job, which token should look at which
    group: int  # W
    isolated: bool = False

    @property
    def context(self) -> int:
        return self.chunk.shape[1]

    def to(self, device: torch.device) -> "Batch":
        names = ("ids", "positions", "chunk", "question", "targets", "kinds")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def context_mask(self) -> Tensor:
        """(1 or batch, C, C): causal; isolated chunks see the prefix and themselves only."""
        chunk = self.chunk
        causal = torch.ones(1, self.context, self.context, dtype=torch.bool, device=chunk.device)
        causal = causal.tril()
        if not self.isolated:
            return causal
        same = (chunk[:, :, None] == chunk[:, None, :]) | (chunk[:, None, :] == 0)
        return same & causal

    def question_mask(self, group: int = 0) -> Tensor:
        """(batch, groups, W, C + W): a question sees its context and its own earlier tokens.

        `group` other than the batch's own may be Q: one group of all.
        """
        question = self.question.view(len(self.ids), -1, group or self.group)
        same = (question[..., :, None] == question[..., None, :]).tril()
        real = (self.chunk >= 0)[:, None, None].expand(*question.shape, -1)
        return torch.cat((real, same), 3)


def token_at(encoding: Encoding, character: int) -> int:
    token = encoding.char_to_token(character)
    assert token is not None
    return token


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    return list(tokenizer.encode_batch(texts, add_special_tokens=False))


@dataclass(slots=True)
class Row:
    """One prompt as lists. Question tokens count from 0 here: they follow the longest context."""

    ids: list[int]
    chunk: list[int]
    starts: list[int] = field(default_factory=list)  # first token of every chunk
    encodings: list[Encoding] = field(default_factory=list)
    tail: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # see `ask`
    guides: dict[str, list[tuple[int, int]]] = field(
        default_factory=lambda: {job: [] for job in JOBS}
    )

    def place(self, spot: Spot) -> int:
        return self.starts[spot[0]] + token_at(self.encodings[spot[0]], spot[1])

    def write(self, tokenizer: Tokenizer, prompt: Prompt, isolated: bool) -> None:
        """Append the chunks; a binding across chunks is no guide where chunks are isolated."""
        self.encodings = encode(tokenizer, [chunk_text(chunk) for chunk in prompt.chunks])
        for number, encoding in enumerate(self.encodings):
            self.starts.append(len(self.ids))
            self.ids += encoding.ids
            self.chunk += [number + 1] * len(encoding.ids)
        for document in prompt.documents:
            for fact in document.facts:
                if isolated and fact.mention[0] != fact.spot[0]:
                    continue
                value = self.place((document.first_chunk + fact.spot[0], fact.spot[1]))
                name = self.place((document.first_chunk + fact.mention[0], fact.mention[1]))
                self.guides["bind"].append((value, name))

    def ask(
        self, number: int, question: Question, asked: Encoding, answer: list[int], hidden: bool
    ) -> None:
        """Append (id, position, question number, target, kind) per token. Hidden: no targets."""
        kind = BINDINGS.index(question.binding)
        left = -len(self.tail) % GROUP  # of the group begun
        if left < len(asked.ids) + len(answer) - 1:
            self.tail += [EMPTY] * left
        start, last = len(self.tail), len(self.tail) + len(asked.ids) - 1
        labels = [-1] * (len(asked.ids) - 1) + ([-1] * len(answer) if hidden else answer)
        for i, (token, label) in enumerate(zip(asked.ids + answer[:-1], labels, strict=True)):
            self.tail.append((token, len(self.ids) + i, number, label, kind))
        if hidden:
            return
        mark = last - 3  # the question mark of "?\nAnswer:"
        name = start + token_at(asked, len("Question: ") + question.name_end)
        self.guides["name"].append((mark, name))
        self.guides["fact"].append((mark, self.place(question.first)))
        self.guides["mark"].append((last, mark))
        self.guides["answer"].append((last, self.place(question.last)))


def row_of(tokenizer: Tokenizer, prompt: Prompt, isolated: bool) -> Row:
    """Encode every part alone and concatenate the ids."""
    prefix = [BOS, *tokenizer.encode(PREFIX, add_special_tokens=False).ids]
    row = Row(list(prefix), [0] * len(prefix))
    row.write(tokenizer, prompt, isolated)
    asked = encode(tokenizer, [question_text(q.text) for q in prompt.questions])
    answers = encode(tokenizer, [answer_text(q.answer) for q in prompt.questions])
    for number, question in enumerate(prompt.questions):
        hidden = isolated and question.binding in ("split", "hopsplit")
        row.ask(number, question, asked[number], [*answers[number].ids, EOS], hidden)
    return row


def collate(tokenizer: Tokenizer, prompts: list[Prompt], isolated: bool = False) -> Batch:
    """Pad the prompts' rows into one batch."""
    rows = [row_of(tokenizer, prompt, isolated) for prompt in prompts]
    c, q = max(len(row.ids) for row in rows), max(len(row.tail) for row in rows)
    group = min(q, GROUP)
    q += -q % group

    def pad(lists: list[list[int]], width: int, value: int) -> Tensor:
        return torch.tensor([item + [value] * (width - len(item)) for item in lists])

    columns = [
        pad([[item[i] for item in row.tail] for row in rows], q, value)
        for i, value in enumerate(EMPTY)
    ]
    guides: dict[str, list[Pair]] = {}
    for job in JOBS:
        source = 0 if job == "bind" else c
        target = c if job in ("name", "mark") else 0
        guides[job] = [
            (number, a + source, b + target)
            for number, row in enumerate(rows)
            for a, b in row.guides[job]
        ]
    return Batch(
        ids=torch.cat((pad([row.ids for row in rows], c, PAD), columns[0]), 1),
        positions=torch.cat((torch.arange(c).expand(len(rows), c), columns[1]), 1),
        chunk=pad([row.chunk for row in rows], c, -1),
        question=columns[2],
        targets=columns[3],
        kinds=columns[4],
        guides=guides,
        group=group,
        isolated=isolated,
    )
