"""Write quality.ipynb beside this file: ``python -m examples.make_quality``."""

from __future__ import annotations

from pathlib import Path

from examples.notebook import write

CELLS = [
    "# Quality against budget\n\nHow much must be computed again until the answers are those of "
    "full prefill? First the shipped world's questions, a few of each kind:",
    """\
from ragcache.eval.dataset import load_dataset, spread_questions
from ragcache.models import world_file

contexts = spread_questions(load_dataset(world_file("prompts.jsonl")), 12)
print(sum(len(context.questions) for context in contexts), "questions over", len(contexts))
print(contexts[0].questions[0].text)""",
    "Every mode answers all of them, with the same chunks in the prompt:",
    """\
from ragcache.eval.evaluate import compare, make_blenders
from ragcache.settings import Settings

chosen = make_blenders(["full", "reuse", "fused", "cacheblend"], [0.05, 0.15, 0.3])
((_, figures),) = compare(Settings.load(), {"world": contexts}, chosen, max_tokens=8)
for one in figures:
    print(f"{one.mode:16} {one.mean_match.value:4.0%} right, {one.charged:4.0%} computed")""",
    "Up is better, and left is cheaper. The dashed line is full prefill:",
    """\
from ragcache.eval.plot import plot_figure

plot_figure({"world": figures})""",
]

if __name__ == "__main__":
    write(CELLS, Path(__file__).resolve().with_name("quality.ipynb"))
