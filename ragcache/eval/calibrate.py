"""Choose a mode and a ratio without labels: the cheapest that keeps full prefill's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.blend import Blender, blender
from ragcache.blend.ape import APE
from ragcache.blend.base import check_ratio
from ragcache.blend.full import Full
from ragcache.eval.dataset import EvalContext, Question, read_questions, spread_questions
from ragcache.eval.evaluate import compare
from ragcache.eval.summary import ModeSummary
from ragcache.settings import Settings
from ragcache.util.list_argument import require_list

if TYPE_CHECKING:
    from ragcache.rag import RagCache

__all__ = ["calibrate", "candidates", "cheapest", "retrieve_contexts", "settings_of_store"]

#: The ratios that are tried for a mode that takes a ratio and does not name one.
RATIOS = 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5
_STEPS = 0.6, 0.7, 0.8, 0.9, 1.0


def _ape_grid() -> dict[str, Blender]:
    """APE with temperatures and scales from 0.6 to 1, by label: the authors' search range."""
    return {f"ape:temperature={t},scale={s}": APE(t, s) for t, s in product(_STEPS, _STEPS)}


def candidates(modes: Sequence[str]) -> dict[str, Blender]:
    """Blenders by label: each mode at all of :data:`RATIOS` (``fused@0.05``).

    ``ape`` is tried on a grid of its parameters. A mode that takes no ratio, or names its own, is
    tried as it is. Raises ConfigError for an unknown mode.
    """
    made: dict[str, Blender] = {}
    for name in require_list(modes, "modes"):
        plain = blender(name)
        if name == "ape":
            made |= _ape_grid()
        elif plain.ratio is not None and "recompute_ratio" not in name:
            made |= {f"{name}@{ratio:g}": blender(name, ratio) for ratio in RATIOS}
        else:
            made[name] = plain
    return made


def retrieve_contexts(path: Path, cache: RagCache) -> list[EvalContext]:
    """The questions of a text file, one per line, each with the chunks that ``cache`` retrieves."""
    return [
        EvalContext(
            tuple(found.chunk.text for found in cache.retrieve(text)), (Question(text, ()),)
        )
        for text in read_questions(path)
    ]


def settings_of_store(settings: Settings, cache: RagCache) -> Settings:
    """``settings`` with the model, codec and encoding context that an open store has."""
    recorded = {"model": "model", "codec": "codec", "encoding_context": "compile"}
    missing = {name: key for name, key in recorded.items() if not getattr(settings, name)}
    known = {name: cache.catalog.get_setting(key) for name, key in missing.items()}
    return settings.model_copy(update={name: value for name, value in known.items() if value})


def calibrate(
    settings: Settings,
    contexts: Sequence[EvalContext],
    modes: Sequence[str] = ("fused",),
    *,
    limit: int = 50,
    max_tokens: int = 32,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ModeSummary]:
    """Summaries of :func:`candidates`, cheapest first.

    ``limit`` questions from as many contexts as possible are answered, by full prefill too; the
    correct answers are not used. Raises as :func:`ragcache.eval.evaluate.compare`.
    """
    asked = {"questions": spread_questions(contexts, limit)}
    chosen = {"full": Full(), **candidates(modes)}
    ((_, found),) = compare(
        settings, asked, chosen, max_tokens=max_tokens, processes=processes, progress=progress
    )
    return sorted((one for one in found if one.mode != "full"), key=_cost)


def cheapest(found: Sequence[ModeSummary], keep: float) -> ModeSummary | None:
    """The cheapest mode that keeps the share ``keep`` of full prefill's answers, or None.

    A ratio qualifies only if all larger ratios of its mode do too, so that a lucky result is not
    chosen. Raises ConfigError unless ``keep`` is in [0, 1].
    """
    check_ratio(keep, "keep")
    qualified: list[ModeSummary] = []
    for _, curve in groupby(sorted(found, key=_method), key=_method):
        falling = sorted(curve, key=_cost, reverse=True)
        qualified += takewhile(lambda f: f.same is not None and f.same.value >= keep, falling)
    return min(qualified, key=_cost, default=None)


def _method(figures: ModeSummary) -> str:
    """The mode's label without the ratio."""
    return figures.mode.partition("@")[0]


def _cost(figures: ModeSummary) -> tuple[float, float]:
    """The charged share; ties are broken by the KL divergence from full prefill."""
    return figures.charged, figures.kl or 0.0
