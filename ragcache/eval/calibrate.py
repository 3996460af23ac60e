"""Choosing a mode and a ratio without labels: the least work that keeps full prefill's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ragcache.blend import Blender, blender
from ragcache.blend.ape import APE
from ragcache.blend.base import check_ratio
from ragcache.blend.full import Full
from ragcache.eval.dataset import Context, Question, lines, spread
from ragcache.eval.evaluate import compare
from ragcache.eval.summary import Figures
from ragcache.settings import Settings
from ragcache.util.several import several

if TYPE_CHECKING:
    from ragcache.rag import RagCache

#: What is tried of a mode that takes a ratio and does not name one.
RATIOS = 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5
_STEPS = 0.6, 0.7, 0.8, 0.9, 1.0


def ape_grid() -> dict[str, Blender]:
    """Every APE with temperature and scale of 0.6 to 1, by its mode; the authors search as far."""
    return {f"ape:temperature={t},scale={s}": APE(t, s) for t, s in product(_STEPS, _STEPS)}


def candidates(modes: Sequence[str]) -> dict[str, Blender]:
    """Blenders by label: every mode at all of :data:`RATIOS` (``fused@0.05``), ``ape`` at its grid,
    and a mode that takes no ratio, or names its own, as it is. Raises ConfigError."""
    made: dict[str, Blender] = {}
    for name in several(modes, "modes"):
        plain = blender(name)
        if name == "ape":
            made |= ape_grid()
        elif "recompute_ratio" in plain.parameters and "recompute_ratio" not in name:
            made |= {f"{name}@{ratio:g}": blender(name, ratio) for ratio in RATIOS}
        else:
            made[name] = plain
    return made


def retrieved(path: Path, cache: RagCache) -> list[Context]:
    """Questions of a text file, one a line, each over the chunks that ``cache`` answers it from."""
    return [
        Context(tuple(found.chunk.text for found in cache.retrieve(text)), (Question(text, ()),))
        for text in lines(path)
    ]


def of_store(settings: Settings, cache: RagCache) -> Settings:
    """``settings`` with the model, codec and encoding context that an open store has."""
    recorded = {"model": "model", "codec": "codec", "encoding_context": "compile"}
    missing = {name: key for name, key in recorded.items() if not getattr(settings, name)}
    known = {name: cache.catalog.get_setting(key) for name, key in missing.items()}
    return settings.model_copy(update={name: value for name, value in known.items() if value})


def calibrate(
    settings: Settings,
    contexts: Sequence[Context],
    modes: Sequence[str] = ("fused",),
    *,
    limit: int = 50,
    max_tokens: int = 32,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Figures]:
    """Figures of :func:`candidates`, least work first: the curve from which to choose.

    ``limit`` questions are asked, of as many contexts as there are, and answered in full too; the
    right answers play no part. Errors as :func:`ragcache.eval.evaluate.compare`.
    """
    asked = {"questions": spread(contexts, limit)}
    chosen = {"full": Full(), **candidates(modes)}
    ((_, found),) = compare(
        settings, asked, chosen, max_tokens=max_tokens, processes=processes, progress=progress
    )
    return sorted((one for one in found if one.mode != "full"), key=_work)


def least(found: Sequence[Figures], keep: float) -> Figures | None:
    """The least work that gives the share ``keep`` of full prefill's answers, or None.

    A ratio counts only where all larger ones of its mode keep as much: one that gets there by luck
    is not chosen. Raises ConfigError unless ``keep`` is in [0, 1].
    """
    check_ratio(keep, "keep")
    kept: list[Figures] = []
    for _, curve in groupby(sorted(found, key=_method), key=_method):
        falling = sorted(curve, key=_work, reverse=True)
        kept += takewhile(lambda f: f.same is not None and f.same.value >= keep, falling)
    return min(kept, key=_work, default=None)


def _method(figures: Figures) -> str:
    """Its label without the ratio."""
    return figures.mode.partition("@")[0]


def _work(figures: Figures) -> tuple[float, float]:
    """What is charged; where that is the same, how far from full prefill."""
    return figures.charged, figures.kl or 0.0
