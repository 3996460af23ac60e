"""Write docs/benchmarks.md: ``python -m bench``.

Every benchmark runs in a separate process, so that peak memory is measured separately, and saves
its results as JSON. A benchmark with saved results is not run again without ``--again``, so texts
can be changed without measuring again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import get_type_hints

from bench import growth, load, model, packing, reading, ttft
from bench.figures import draw
from bench.results import ROOT, Kept, file
from bench.results import load as kept_results
from ragcache.eval import plot

#: In the order of their sections. A benchmark is a module with
#: - a docstring whose first sentence, before the colon, is its heading, and the rest its text;
#: - ``measure(...)``, annotated with the type of what it finds: dataclasses of plain values;
#: - ``table(found)``, Markdown, and perhaps ``panels(found)``, curves for a figure;
#: - ``main()`` with ``--out``, see results.py.
BENCHMARKS: tuple[ModuleType, ...] = (
    ttft,
    model,
    load,
    growth,
    packing,
    reading,
)

INTRODUCTION = """\
# Benchmarks

`python -m bench` (`make bench`) writes this page. Every section can be printed alone by the command
that it names, which has options for other sizes. Results are checked after they were timed. Models
of random weights take the same time as trained ones; [quality.md](quality.md) has the quality of
the answers.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="results")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    given = parser.parse_args()
    plot.check_plot(given.page.with_suffix(".svg"))
    for benchmark in BENCHMARKS:
        path = file(given.out, name(benchmark))
        if path.exists() and not given.again:
            print(f"{name(benchmark)}: taken from {path}", flush=True)
        else:
            command = (sys.executable, "-m", benchmark.__name__, "--out", str(given.out))
            subprocess.run(command, check=True)
    write(BENCHMARKS, given.out, given.page)
    print(f"wrote {given.page}")


def write(benchmarks: Sequence[ModuleType], out: Path, page: Path) -> None:
    """Write ``page``, and its figures in ``figures/`` beside it, from the results in ``out``."""
    sections = []
    for benchmark in benchmarks:
        kind = get_type_hints(benchmark.measure)["return"]
        kept = kept_results(out, name(benchmark), kind)
        sections.append(section(benchmark, kept, page.parent / "figures"))
    page.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")


def section(benchmark: ModuleType, kept: Kept, figures: Path) -> str:
    """Heading, text, figure, tables, and where they were measured."""
    heading, text = about(benchmark)
    parts = [f"## {heading}\n", f"{text}\n"]
    if hasattr(benchmark, "panels"):
        picture = figures / f"{name(benchmark)}.svg"
        draw(benchmark.panels(kept.found), picture)
        parts.append(f"![{heading}]({figures.name}/{picture.name})\n")
    parts.append(benchmark.table(kept.found))
    where = f"{kept.machine}; commit {kept.commit}; peak memory {kept.peak_mib:,} MiB."
    parts.append(f"`python -m {benchmark.__name__}` on {where}\n")
    return "\n".join(parts)


def about(benchmark: ModuleType) -> tuple[str, str]:
    """Heading and text of a section, in Markdown, from the module's docstring."""
    first, _, rest = dedent(benchmark.__doc__ or "").replace("``", "`").partition("\n\n")
    return first.partition(": `python")[0].strip(), rest.strip()


def name(benchmark: ModuleType) -> str:
    """The name of its files, without their ending."""
    return benchmark.__name__.rpartition(".")[2]
