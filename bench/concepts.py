"""The pictures of docs/concepts.md: ``python -m bench.concepts``. Needs the extra ``plots``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ragcache.models import TINY
from ragcache.rag import RagCache
from ragcache.store import Miss
from ragcache.types import Document

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"

PARTS = {"prefix": 2, "chunk A": 6, "chunk B": 6, "question": 3}
RECOMPUTED = (2, 4)  # rows of chunk B in the picture of fusion
STORED, FRESH, UNSEEN = "#c9ced6", "#00897b", "#f6c9c4"

CHUNKS = "Mira Holt works as a painter.", "She lives in Oslo. Her hobby is chess."
SHARE = 0.15


def main() -> None:
    from matplotlib import rc_context

    FIGURES.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": "ragcache", "svg.fonttype": "none", "font.size": 9}):
        for name, picture in (("who-sees-whom", who_sees_whom()), ("sensitivity", sensitive())):
            picture.savefig(FIGURES / f"{name}.svg", format="svg", metadata={"Date": None})


def who_sees_whom() -> Figure:
    """An attention matrix, queries by keys: computed now, stored, or never computed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    picture = Figure(figsize=(9, 3.6), layout="constrained")
    panels = picture.subplots(1, 3)
    for axes, title, fresh in zip(
        panels,
        ("full prefill", "reuse", "fusion"),
        (rows(), rows(()), rows(RECOMPUTED)),
        strict=True,
    ):
        matrix(axes, title, fresh)
    shown = {"computed now": FRESH, "stored": STORED, "never computed": UNSEEN}
    handles = [Patch(color=colour, label=label) for label, colour in shown.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return picture


def rows(chosen: tuple[int, ...] | None = None) -> Tensor:
    """Which rows of the prompt are computed now: all, or the question and ``chosen`` of chunk B."""
    fresh = torch.zeros(sum(PARTS.values()), dtype=torch.bool)
    fresh[-PARTS["question"] :] = True
    start = PARTS["prefix"] + PARTS["chunk A"]
    fresh[[start + row for row in chosen or ()]] = True
    return fresh if chosen is not None else torch.ones_like(fresh)


def matrix(axes: Axes, title: str, fresh: Tensor) -> None:
    from matplotlib.colors import ListedColormap

    count, start = len(fresh), PARTS["prefix"] + PARTS["chunk A"]
    ends = torch.tensor(list(PARTS.values())).cumsum(0).tolist()
    state = torch.ones(count, count)  # a number for each colour below
    state[start : ends[2], PARTS["prefix"] : start] = 2
    state[fresh] = 3
    colours = ListedColormap(["white", STORED, UNSEEN, FRESH])
    axes.imshow(state.tril(), colours, vmin=0, vmax=3, extent=(0, count, count, 0))
    for at in range(count):
        axes.axhline(at, color="white", linewidth=0.5)
        axes.axvline(at, color="white", linewidth=0.5)
    for end in ends[:-1]:
        axes.axhline(end, color="0.4", linewidth=0.6)
        axes.axvline(end, color="0.4", linewidth=0.6)
    middles = [end - length / 2 for end, length in zip(ends, PARTS.values(), strict=True)]
    axes.set_title(title)
    axes.set_xticks(middles, list(PARTS), rotation=30)
    axes.set_yticks(middles, list(PARTS))
    axes.tick_params(length=0)


def sensitive() -> Figure:
    """What the small model stores of the second chunk, token by token."""
    from matplotlib.figure import Figure

    with tempfile.TemporaryDirectory() as folder, RagCache.open(folder, TINY) as cache:
        cache.add([Document(f"d{n}", text) for n, text in enumerate(CHUNKS)])
        [key] = cache.indexing.keys("d1")
        found = cache.store.get_header(key)
        assert not isinstance(found, Miss)
        values, names = found.sensitivity, cache.engine.pieces(key.tokens)
    best = sorted(values, reverse=True)[: max(1, round(SHARE * len(values)))]
    picture = Figure(figsize=(9, 2.8), layout="constrained")
    axes = picture.subplots()
    colours = [FRESH if value in best else STORED for value in values]
    axes.bar(range(len(values)), values, color=colours)
    axes.set_xticks(range(len(values)), [name.strip() or "end" for name in names], rotation=60)
    axes.set_ylabel("sensitivity")
    axes.set_title(f"most sensitive {SHARE:.0%} computed again, the rest reused")
    axes.spines[["top", "right"]].set_visible(False)
    return picture


if __name__ == "__main__":
    main()
