"""Choosing a method's parameters without labels: by how near it comes to full prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from ragcache.blend import Blender
from ragcache.blend.ape import APE
from ragcache.blend.full import Full
from ragcache.dataset import Context, spread
from ragcache.evaluate import compare
from ragcache.scores import Figures
from ragcache.settings import Settings

_STEPS = 0.6, 0.7, 0.8, 0.9, 1.0


def ape_grid() -> dict[str, Blender]:
    """Every APE with temperature and scale of 0.6 to 1, by its mode; the authors search as far."""
    return {f"ape:temperature={t},scale={s}": APE(t, s) for t, s in product(_STEPS, _STEPS)}


def calibrate(
    settings: Settings,
    contexts: Sequence[Context],
    candidates: Mapping[str, Blender],
    *,
    limit: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Figures]:
    """Figures of ``candidates``, the nearest to full prefill first.

    Near is the mean KL divergence from full prefill's distribution of the first answer token, over
    ``limit`` questions of as many contexts as there are; their answers play no part. Errors as
    :func:`ragcache.evaluate.compare`.
    """
    asked = {"questions": spread(contexts, limit)}
    modes = {"full": Full(), **candidates}
    ((_, found),) = compare(settings, asked, modes, max_tokens=1, progress=progress)
    return sorted(found[1:], key=lambda one: one.kl or 0.0)
