"""Write docs/real-models.md and its figures from the results of :mod:`bench.real`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.budgets import Budgets
from bench.published import published_table
from bench.real_models import MODELS
from bench.real_results import DATA_SETS, Results, load_results
from bench.results import table
from ragcache.eval.bootstrap import Estimate
from ragcache.eval.plot import check_plot, save_plot
from ragcache.eval.summary import ModeSummary

MEASURES = {"answer_kl": "divergence from full prefill", "pgr": "performance gap recovered"}

INTRODUCTION = """\
# Real models and questions

How close every fusion method comes to full prefill, on pretrained models and questions about
Wikipedia. The page shows what came out, also where `fused` does not lead. To measure it again:

1. `python -m bench.real_models smollm2 --out MODELS` downloads a model as a GGUF file.
2. `python -m bench.questions hotpotqa_100.json musique_100.json --out SETS` writes the data sets.
3. `python -m bench.real --model smollm2 --set hotpotqa --models MODELS --sets SETS --out RESULTS`
   asks the questions of one data set, and goes on where it was stopped.
4. `python -m bench.real --tables RESULTS` writes this page from all that is saved.

What the figures mean:

- **Articles**: questions about the articles of `ragcache demo`, over the chunks that it retrieves
  (`python -m bench.articles`): prompts of about 2,200 tokens, in which most chunks name their
  subject by a pronoun. The rule of `fused` was chosen on the first five.
- **HotpotQA**: the two paragraphs that support the answer and four others, each a chunk that
  begins with its title (CC BY-SA 4.0). **Split paragraphs**: the same, but each paragraph is two
  chunks, and the second has no title, as when a splitter cuts real text. **MuSiQue**: 20
  paragraphs (CC BY 4.0). The order of the paragraphs is drawn once for each question.
- **Charged** is the share of the chunks' tokens that are computed, mean over all layers, including
  probes and layers that are computed in full. The parameter of each method was set so that its
  charged budget on the first prompts is close to 5, 10, 15 or 20 %.
- **F1** and **EM** (exact match) compare the first line of the answer with the right answers, in
  percent.
- **PGR**, the performance gap recovered, is (F1 - F1 without chunks) / (F1 of full prefill - F1
  without chunks). It is shown where full prefill gains at least 25 points of F1 over no chunks.
- **KL** is KL(full || method) in nats, and **top-1** the share of tokens at which both models'
  most likely next token is the same: means over the tokens of full prefill's whole answer, which
  both are given (teacher forcing). **Same** is the share of questions with the answer of full
  prefill.
- In brackets are 95 % intervals (bootstrap over questions; differences are paired).
"""

PAPERS = """\
Papers measure larger models, longer prompts and GPUs. Measured here:
{run}, at the charged budget nearest to 15 %.

- *Times sooner*: the median, over questions, of full prefill's time to the first token divided by
  the method's, on prompts of about 1,000 tokens, while other programs ran.
- *PGR*: the share of what the chunks add to F1 in full prefill.
- *Divergence left*: KL over the whole answer, in percent of that of `reuse`.
"""


def write(out: Path, page: Path) -> None:
    """Write ``page``, and its figures in ``figures/`` beside it, from the results in ``out``.

    Raises SourceError if there are none, and ConfigError without matplotlib.
    """
    check_plot(page.with_suffix(".svg"))
    results = load_results(out)
    figures = page.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION]
    for data in DATA_SETS:
        of_set = [found for found in results if found.data == data]
        if of_set:
            parts.append(f"## {DATA_SETS[data]}\n")
            parts += _plots(of_set, data, figures)
            parts += [_section(found) for found in of_set]
    parts.append(_published(results))
    page.write_text("\n".join(parts), encoding="utf-8")


def _published(results: Sequence[Results]) -> str:
    """What papers say, and what was measured in the run with the most methods, and then questions,
    of those with a PGR if there are any."""

    def rank(found: Results) -> tuple[bool, int, int]:
        return bool(found.summaries[0].admitted), len(found.budgets.found), found.questions

    most = max(results, key=rank)
    return "\n".join(
        ["## Papers say, and we measured\n", PAPERS.format(run=most.title), published_table(most)]
    )


def _plots(results: Sequence[Results], data: str, folder: Path) -> Iterator[str]:
    """Draw every measure that a model has, a panel for each model; yields the images."""
    for measure, name in MEASURES.items():
        panels = {
            MODELS[found.model].title: _plotted(found)
            for found in results
            if measure == "answer_kl" or found.summaries[0].admitted
        }
        if panels:
            path = folder / f"real-models-{data}-{measure.replace('_', '-')}.svg"
            save_plot(panels, path, y=measure)
            title = f"{DATA_SETS[data]}: {name} over the charged budget"
            yield f"![{title}]({folder.name}/{path.name})\n"


def _plotted(found: Results) -> list[ModeSummary]:
    """All modes but prefix, whose budget is far from the others."""
    return [f for f in found.summaries if f.method != "prefix"]


def _section(found: Results) -> str:
    """Heading, who leads, table, what is missing, and where it was measured."""
    facts = found.facts
    where = (
        f"`python {_without_paths(facts.command)}` on {facts.machine}; {facts.dtype}; "
        f"commit {facts.commit}; {found.questions} questions.\n"
    )
    parts = [f"### {found.title}\n", _about(found), _table(found)]
    parts += [f"- {line}" for line in _leaders(found)]
    parts += [f"- {line}" for line in _missing(found.budgets)]
    return "\n".join([*parts, "", where])


def _without_paths(command: str) -> str:
    """The command as step 3 of the introduction writes it."""
    words = shlex.split(command)
    for option, name in {"--models": "MODELS", "--sets": "SETS", "--out": "RESULTS"}.items():
        if option in words[:-1]:
            words[words.index(option) + 1] = name
    return shlex.join(words)


def _about(found: Results) -> str:
    gap = found.summaries[0].gap
    if gap is None:
        return ""
    shown = f"F1 of full prefill is {_points(gap)} points above that without chunks"
    if found.summaries[0].admitted:
        return f"{shown}.\n"
    return f"{shown}: less than 25, so this model's PGR on this data set says nothing.\n"


def _table(found: Results) -> str:
    settings = found.budgets.modes
    heads = ["method", "parameters", "charged", "F1", "EM", "PGR", "KL", "top-1", "same"]
    rows = [
        [
            f.mode.partition("@")[0],
            f"`{settings[f.mode].partition(':')[2]}`" if f.mode in settings else "",
            f"{100 * f.charged:.1f} %",
            f"{100 * f.f1.value:.1f}",
            f"{100 * f.mean_match.value:.1f}",
            _points(f.pgr),
            _nats(f.answer_kl),
            _percent(f.answer_top1),
            _percent(f.same),
        ]
        for f in _by_budget(found)
    ]
    return table(heads, rows)


def _by_budget(found: Results) -> list[ModeSummary]:
    """Modes without a budget, then those of each budget, from the lowest KL up."""
    groups: dict[str, list[ModeSummary]] = {"": []}
    for f in found.summaries:
        groups.setdefault(f.mode.partition("@")[2], []).append(f)
    plain = groups.pop("")
    ordered = sorted(groups.items(), key=lambda group: float(group[0].rstrip("%")))
    return plain + [f for _, group in ordered for f in sorted(group, key=_kl)]


def _leaders(found: Results) -> Iterator[str]:
    """For each budget, the method of the lowest KL and the highest PGR, against `fused`."""
    budgets = dict.fromkeys(label.partition("@")[2] for label in found.budgets.modes)
    for budget in sorted(budgets, key=lambda text: float(text.rstrip("%"))):
        ours = f"fused@{budget}"
        labels = {m: m for m in found.budgets.modes if m.partition("@")[2] == budget}
        if ours not in labels or len(labels) < 2:
            continue
        modes = labels | {"full": "full", "none": "none"}
        compared = [f for f in found.compared(modes, ours) if f.mode in labels]
        said = [_leader(compared, ours, "KL", _kl, lambda f: f.answer_kl_difference, _nats)]
        if compared[0].admitted:
            said.append(
                _leader(
                    compared, ours, "F1", lambda f: -f.f1.value, lambda f: f.f1_difference, _points
                )
            )
        yield f"At {budget.replace('%', ' %')}: {' '.join(said)}"


def _leader(
    compared: Sequence[ModeSummary],
    ours: str,
    measure: str,
    key: Callable[[ModeSummary], float],
    difference: Callable[[ModeSummary], Estimate | None],
    shown: Callable[[Estimate | None], str],
) -> str:
    """Which method is best by ``key``, the lowest first, in a sentence."""
    ranked = sorted(compared, key=key)
    best = ranked[0]
    if best.mode == ours:
        second = ranked[1]
        behind = shown(difference(second))
        return f"`fused` leads in {measure}; {_name(second)} is next ({behind})."
    place = [f.mode for f in ranked].index(ours) + 1
    gap = difference(best)
    sure = gap is not None and gap.interval is not None and not _holds_zero(gap.interval)
    doubt = "" if sure else ", which may be chance"
    return (
        f"**{_name(best)} leads in {measure}, not `fused`**, which is number {place} of "
        f"{len(ranked)} (difference {shown(gap)}{doubt})."
    )


def _holds_zero(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def _missing(budgets: Budgets) -> Iterator[str]:
    """Methods that the model cannot use, and those without a row at a target, which is below their
    lowest charged budget."""
    for method, why in budgets.refused.items():
        yield f"{method} cannot be used: {why}"
    targets = dict.fromkeys(target for found in budgets.found.values() for target in found)
    for method, found in budgets.found.items():
        without = [target.replace("%", " %") for target in targets if target not in found]
        if without:
            least = 100 * budgets.least[method]
            yield f"{method} has no row at {', '.join(without)}: it charges at least {least:.1f} %."


def _name(f: ModeSummary) -> str:
    return f"`{f.mode.partition('@')[0]}`"


def _kl(f: ModeSummary) -> float:
    return f.answer_kl.value if f.answer_kl is not None else 0.0


def _points(found: Estimate | None) -> str:
    """In points, with the interval."""
    return _with_interval(found, lambda value: f"{100 * value:.1f}")


def _nats(found: Estimate | None) -> str:
    return _with_interval(found, lambda value: f"{value:.3f}")


def _percent(found: Estimate | None) -> str:
    return "" if found is None else f"{100 * found.value:.0f} %"


def _with_interval(found: Estimate | None, shown: Callable[[float], str]) -> str:
    if found is None:
        return ""
    if found.interval is None:
        return shown(found.value)
    low, high = found.interval
    return f"{shown(found.value)} [{shown(low)}, {shown(high)}]"
