"""What papers say of ragcache's fusion methods, beside what :mod:`bench.real` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.real_results import Results
from bench.results import table
from ragcache.eval.summary import ModeSummary

BUDGET = 0.15  # charged; of each method the row that is nearest

#: The paper, and what it says, by the method's name in :data:`bench.budgets.METHODS`.
PUBLISHED: Mapping[str, tuple[str, str]] = {
    "cacheblend": (
        "[CacheBlend](https://arxiv.org/abs/2405.16444)",
        "2.2 to 3.3 times sooner, F1 within .02 (7B to 70B)",
    ),
    "epic": ("[EPIC](https://arxiv.org/abs/2410.15332)", "up to 8 times sooner, 0 to 7 % lost"),
    "cachecraft": (
        "[Cache-Craft](https://arxiv.org/abs/2502.15734)",
        "30 % computed keep 90 % of Rouge",
    ),
    "kvshare": ("[KVShare](https://arxiv.org/abs/2503.16525)", "up to 9.4 times sooner"),
    "prophet": (
        "[ProphetKV](https://arxiv.org/abs/2602.02579)",
        "20 % computed, 4.6 times sooner, better answers than CacheBlend",
    ),
    "infoflow": (
        "[InfoFlow KV](https://arxiv.org/abs/2603.05353)",
        "15 % computed match full prefill (14B)",
    ),
    "qcfuse": ("[QCFuse](https://arxiv.org/abs/2606.05875)", "1.7 times sooner"),
    "ape": ("[APE](https://arxiv.org/abs/2502.05431)", "98 % of the quality, 4.5 times faster"),
    "reuse": ("naive reuse", "fastest, worst answers"),
    "fused": ("`fused` (ours)", "–"),
}


def published_table(found: Results) -> str:
    """A row for each published method that ``found`` has, in Markdown; with its PGR, if that says
    something here."""
    modes = {f.mode: f for f in found.summaries}
    lost = modes["reuse"].answer_kl if "reuse" in modes else None
    admitted, rows = found.summaries[0].admitted, []
    for method, (paper, says) in PUBLISHED.items():
        ours = _nearest(method, found.summaries)
        if ours is None or ours.answer_kl is None or lost is None or not lost.value:
            continue
        rows.append(
            [
                paper,
                says,
                f"{100 * ours.charged:.0f} %",
                f"{ours.speedup or 0:.1f}",
                *([f"{100 * ours.pgr.value:.0f} %"] if admitted and ours.pgr else []),
                f"{100 * ours.answer_kl.value / lost.value:.0f} %",
            ]
        )
    gap = ["PGR"] if admitted else []
    return table(["method", "paper says", "charged", "times sooner", *gap, "divergence left"], rows)


def _nearest(method: str, summaries: Sequence[ModeSummary]) -> ModeSummary | None:
    """The row of the method whose charged budget is nearest to :data:`BUDGET`."""
    rows = [f for f in summaries if f.mode.partition("@")[0] == method]
    return min(rows, key=lambda f: abs(f.charged - BUDGET), default=None)
