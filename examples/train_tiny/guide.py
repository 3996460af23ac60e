"""Guidance for attention while the circuits form; its weight fades to exactly zero (see train.py).

Five jobs, each for a band of layers:

- bind: a fact's value looks at the last token of its subject's name;
- name: a question's "?" looks at the last token of the name in the question;
- fact: that "?" looks at the value of the fact which the name leads to;
- mark: the last token of the question looks at the "?";
- answer: that last token looks at the answer.

The first is asked of one head in every layer of its band, the others of one head in the whole band.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch, Pair

BANDS = {"bind": (0, 4), "name": (1, 4), "fact": (3, 7), "mark": (6, 10), "answer": (7, 11)}
Seen = list[tuple[Tensor, Tensor]]  # per layer: rotated queries and keys


def guidance(batch: Batch, seen: Seen) -> Tensor:
    """The sum over the jobs of the cross-entropy of the attention of the best head.

    Best is the head that does the job best so far (a soft choice), so none is preferred.
    """
    mask = whole_mask(batch)
    losses = []
    for job, (low, high) in BANDS.items():
        if pairs := batch.guides[job]:
            parts = [[layer] for layer in seen[low:high]] if job == "bind" else [seen[low:high]]
            losses += [best_head(batch, part, mask, pairs) / len(parts) for part in parts]
    return torch.stack(losses).sum()


def best_head(batch: Batch, layers: Seen, mask: Tensor, pairs: list[Pair]) -> Tensor:
    by_row: list[list[tuple[int, int]]] = [[] for _ in range(len(batch.ids))]
    for row, source_token, target_token in pairs:
        by_row[row].append((source_token, target_token))
    width = max(map(len, by_row))
    table = torch.tensor([r + [(0, -1)] * (width - len(r)) for r in by_row]).to(mask.device)
    source, target = table[..., 0], table[..., 1]
    real = target >= 0
    index = torch.arange(len(batch.ids), device=mask.device)[:, None]
    hidden = ~mask[index, source]  # (batch, n, keys)
    losses = []
    for q, k in layers:
        picked = q.transpose(1, 2)[index, source].transpose(1, 2)  # (batch, heads, n, size)
        b, h, n, size = picked.shape
        groups = picked.reshape(b, k.shape[1], -1, size)
        scores = (groups @ k.transpose(2, 3)).reshape(b, h, n, -1).float() * size**-0.5
        scores = scores.masked_fill(hidden[:, None], -1e9).flatten(0, 2)
        wanted = target[:, None].expand(b, h, n).flatten()
        missed = F.cross_entropy(scores, wanted, reduction="none", ignore_index=-1)
        losses.append(missed.view(b, h, n).sum((0, 2)) / real.sum())
    heads = torch.cat(losses)  # one loss per head of the band
    return (torch.softmax(-heads.detach() / 0.1, 0) * heads).sum()


def whole_mask(batch: Batch) -> Tensor:
    """(batch, C + Q, C + Q): what every token may attend to."""
    c = batch.context
    question = batch.question_mask(batch.question.shape[1])[:, 0]
    context = batch.context_mask().expand(len(batch.ids), c, c)
    empty = torch.zeros(len(batch.ids), c, question.shape[1], dtype=torch.bool)
    top = torch.cat((context, empty.to(context.device)), 2)
    return torch.cat((top, question), 1)
