"""The pictures of docs/architecture.md: ``python docs/site/picture.py`` writes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from drawing import Box, arrow, curve, drawing, rectangle, text

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"

sys.path.insert(0, str(ROOT))
from tests.structure import Graph, levels, room_graph  # noqa: E402

#: The text below the name of a package in the picture.
NOTES = {
    "__main__": "entry point",
    "__init__": "public names",
    "api": "REST service",
    "batch": "corpora, question lists",
    "blend": "fusion methods",
    "cli": "command line",
    "core": "one request",
    "engine": "runs the model",
    "errors": "exception classes",
    "eval": "quality of modes",
    "langchain": "LangChain classes",
    "models": "checkpoint files",
    "planning": "load or compute",
    "rag": "the RagCache class",
    "retriever": "documents to chunks",
    "settings": "flags, variables, file",
    "setup": "opens a store",
    "sim": "traces, sizing",
    "store": "stored KV, catalog",
    "testing": "contract tests",
    "text": "valid Unicode",
    "types": "shared data classes",
    "util": "buffers, private files",
    "vllm": "engine in vLLM",
}

WIDTH, ROW = 780.0, 62.0  # of the picture, and from one level to the next, in pixels
BOX, GAP, PASS = 134.0, 14.0, 24.0  # a box, between boxes, and what a passing line takes


def packages() -> str:
    """The packages by level, and their direct imports without those that follow from others."""
    graph = room_graph()
    level = levels(graph)
    top = max(level.values())
    chains = [_chain(a, b, level) for a in sorted(graph) for b in _reduced(graph, a)]
    rows = _order([sorted(n for n in level if level[n] == at) for at in range(top, 0, -1)], chains)
    x = _positions(rows, chains)
    y = {name: 36 + ROW * at for at, row in enumerate(rows) for name in row}
    boxes = {name: _box(name, x[name], y[name]) for name in graph}
    lines = []
    for chain in chains:
        between = [(x[name], y[name]) for name in chain[1:-1]]
        lines.append(curve([boxes[chain[0]].bottom, *between, boxes[chain[-1]].top]))
    numbers = [text(14, 40 + ROW * at, str(top - at), anchor="start") for at in range(top)]
    parts = [*lines, *(box.svg() for box in boxes.values()), *numbers]
    return drawing(WIDTH, 72 + ROW * (top - 1), "The packages of ragcache and their imports", parts)


def _box(name: str, x: float, y: float) -> Box:
    notes = (NOTES[name],) if name in NOTES else ()
    return Box(x, y, BOX, 40, name, notes)


def _reduced(graph: Graph, node: str) -> list[str]:
    """What ``node`` imports, without what it also imports through another of them."""

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(other) for other in graph[name]))

    through = set().union(*(below(other) for other in graph[node]))
    return sorted(graph[node] - through)


def _chain(above: str, below: str, level: Mapping[str, int]) -> list[str]:
    """From ``above`` to ``below`` by one name for every level between them."""
    passed = range(level[above] - 1, level[below], -1)
    return [above, *(f"{above}>{below}@{at}" for at in passed), below]


def _order(rows: list[list[str]], chains: list[list[str]]) -> list[list[str]]:
    """Rows with the names of passing lines, sorted to have few crossings (Sugiyama et al., 1981).

    Each row is sorted by the mean place of its neighbours above, then below, several times.
    """
    rows = [list(row) for row in rows]
    at = {name: number for number, row in enumerate(rows) for name in row}
    for chain in chains:
        for step, name in enumerate(chain[1:-1]):
            rows[at[chain[0]] + step + 1].append(name)
    up, down = _neighbours(chains)
    best, fewest = rows, _crossings(rows, down)
    for turn in range(24):
        beside = down if turn % 2 else up
        for row in reversed(rows) if turn % 2 else rows:
            share = {name: n / max(len(r) - 1, 1) for r in rows for n, name in enumerate(r)}
            row.sort(key=lambda name: _mean([share[o] for o in beside[name]], share[name]))  # noqa: B023
        if (crossings := _crossings(rows, down)) < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _neighbours(chains: list[list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By name, its neighbours in the row above and in the row below."""
    names = {name for chain in chains for name in chain}
    up: dict[str, list[str]] = {name: [] for name in names}
    down: dict[str, list[str]] = {name: [] for name in names}
    for chain in chains:
        for one, other in zip(chain, chain[1:], strict=False):
            down[one].append(other)
            up[other].append(one)
    return up, down


def _crossings(rows: list[list[str]], down: Mapping[str, list[str]]) -> int:
    place = {name: n for row in rows for n, name in enumerate(row)}
    count = 0
    for row in rows:
        ends = [(place[name], place[other]) for name in row for other in down[name]]
        count += sum(a < c and b > d for a, b in ends for c, d in ends)
    return count


def _positions(rows: list[list[str]], chains: list[list[str]]) -> dict[str, float]:
    """Centres: each as near to its neighbours' mean as the order and the gaps allow."""
    up, down = _neighbours(chains)
    x = {name: 0.0 for row in rows for name in row}
    for turn in range(40):
        for row in rows if turn % 2 else reversed(rows):
            wanted = [_mean([x[o] for o in up[n] + down[n]], x[n]) for n in row]
            for name, centre in zip(row, _apart(row, wanted), strict=True):
                x[name] = centre
    left = min(x[n] - _width(n) / 2 for n in x)
    right = max(x[n] + _width(n) / 2 for n in x)
    shift = (WIDTH + 20 - left - right) / 2
    return {name: round(centre + shift, 1) for name, centre in x.items()}


def _apart(row: list[str], wanted: list[float]) -> list[float]:
    """``wanted``, pushed apart from the left and from the right, and the mean of both."""
    least = [(_width(a) + _width(b)) / 2 + GAP for a, b in zip(row, row[1:], strict=False)]
    right, left = list(wanted), list(wanted)
    for n, gap in enumerate(least):
        right[n + 1] = max(right[n + 1], right[n] + gap)
    for n in reversed(range(len(least))):
        left[n] = min(left[n], left[n + 1] - least[n])
    return [(a + b) / 2 for a, b in zip(right, left, strict=True)]


def _width(name: str) -> float:
    return PASS if ">" in name else BOX


def _mean(numbers: list[float], otherwise: float) -> float:
    return sum(numbers) / len(numbers) if numbers else otherwise


def request() -> str:
    """The path of one question, from an entry point to its report."""
    middle, step, width = 420.0, 74.0, 390.0
    doors = [
        Box(260, 40, 150, 42, "ragcache query", ("command line",), "plain"),
        Box(420, 40, 150, 42, "ragcache serve", ("REST",), "plain"),
        Box(580, 40, 150, 42, "ChatRagCache", ("LangChain",), "plain"),
    ]
    steps = [
        ("Request", "question or messages, chunks, mode, ratio, sampling"),
        ("Retrieve", "nearest chunks and their neighbours, unless chunks are given"),
        ("Build the prompt", "texts and chunks in any order, each tokenised alone"),
        ("Look up", "a key for each part: a hit, or a miss with its reason"),
        ("Plan", "which chunks to load or to compute, and the recompute ratio"),
    ]
    chain = [
        Box(middle, 40 + step * (n + 1), width, 46, name, (note,))
        for n, (name, note) in enumerate(steps)
    ]
    y = chain[-1].y + step + 30
    layer = [
        Box(x, y, 146, 62, name, notes)
        for x, name, notes in (
            (164, "Load", ("read ahead by threads,", "verify, decode")),
            (324, "Place", ("rotate keys to their", "positions (RoPE)")),
            (484, "Select", ("the blender names", "rows to recompute")),
            (644, "Recompute", ("these rows, in the", "model's own layer")),
        )
    ]
    ends = [
        Box(middle, y + 92, width, 46, "Decode", ("tokens are streamed from the same KV",)),
        Box(middle, y + 92 + step, width, 46, "Report", ("reuse, cost, times, fallbacks",)),
    ]
    store = Box(88, chain[3].y, 112, 46, "Store", ("headers, KV",), "plain")
    parts = [arrow(door.bottom, (door.x, 75), (middle, 75), chain[0].top) for door in doors]
    parts += [arrow(a.bottom, b.top) for a, b in zip(chain, chain[1:], strict=False)]
    parts += [arrow(a.right, b.left) for a, b in zip(layer, layer[1:], strict=False)]
    panel_top, panel_bottom = y - 52, y + 42
    parts += [
        rectangle(76, panel_top, 656, panel_bottom - panel_top, "panel"),
        text(720, y - 38, "for every layer", anchor="end"),
        arrow(chain[-1].bottom, (middle, panel_top)),
        arrow((middle, panel_bottom), ends[0].top),
        arrow(ends[0].bottom, ends[1].top),
        arrow(chain[3].left, store.right, dashed=True),
        arrow((110, store.bottom[1]), (110, layer[0].top[1]), dashed=True),
        arrow(ends[1].left, (46, ends[1].y), (46, store.bottom[1]), dashed=True),
        text(54, ends[1].y - 7, "misses are stored", anchor="start"),
    ]
    parts += [box.svg() for box in [*doors, *chain, *layer, *ends, store]]
    return drawing(780, ends[1].y + 44, "The path of a question through ragcache", parts)


def ways_of_use() -> str:
    """LangChain, REST and batch, above what they have in common."""
    heads = [(140, "LangChain"), (390, "REST"), (640, "Batch")]
    callers = [
        Box(140, 80, 210, 62, "Your program", ("a chain, an agent,", "or plain Python")),
        Box(390, 80, 210, 62, "HTTP clients", ("OpenAI's client, curl,", "the page at /demo")),
        Box(640, 80, 210, 62, "Files", ("documents,", "questions in JSON Lines")),
    ]
    doors = [
        Box(
            140,
            190,
            210,
            62,
            "ragcache.langchain",
            ("ChatRagCache,", "RagCacheVectorStore"),
            "plain",
        ),
        Box(390, 190, 210, 62, "ragcache serve", ("tenants, queue, jobs,", "metrics"), "plain"),
        Box(640, 190, 210, 62, "ragcache commands", ("index, precompute,", "batch, eval"), "plain"),
    ]
    rag = Box(390, 296, 710, 46, "RagCache", ("one store, one engine: add, ask, evaluate",))
    below = [
        Box(200, 392, 330, 62, "Store", ("LMDB and files on a local disk;", "RAM, object store")),
        Box(580, 392, 330, 62, "Engine", ("the model in this process (transformers),", "or vLLM")),
    ]
    parts = [text(x, 32, name, "name") for x, name in heads]
    parts += [arrow(a.bottom, b.top) for a, b in zip(callers, doors, strict=True)]
    parts += [arrow(door.bottom, (door.x, rag.top[1])) for door in doors]
    parts += [arrow((box.x, rag.bottom[1]), box.top) for box in below]
    parts += [
        arrow(doors[0].right, doors[1].left, dashed=True),
        text(265, 154, "base_url=", anchor="middle"),
    ]
    parts += [box.svg() for box in [*callers, *doors, rag, *below]]
    return drawing(780, 440, "Three ways to use ragcache: LangChain, REST, batch", parts)


PICTURES = {"packages.svg": packages, "request.svg": request, "ways-of-use.svg": ways_of_use}


def main() -> None:
    for name, picture in PICTURES.items():
        (FIGURES / name).write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
