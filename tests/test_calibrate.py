"""Which parameters come nearest to full prefill, without labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragcache.blend import blender
from ragcache.blend.ape import APE
from ragcache.calibrate import ape_grid, calibrate
from ragcache.dataset import Context, Question, spread
from ragcache.errors import ConfigError
from ragcache.settings import Settings
from tests import scene

CONTEXTS = [
    Context((f"Mira {n} plays the cello.", "She was born in Oslo."), (Question("Who?", ("x",)),))
    for n in range(3)
]


def test_the_nearest_comes_first(tmp_path: Path) -> None:
    settings = Settings.load(model=str(scene.save_model(tmp_path / "llama")))
    modes = ["reuse", "random@", "cacheblend@"]
    candidates = {m: blender(m.rstrip("@"), 1.0 if "@" in m else None) for m in modes}
    found = calibrate(settings, CONTEXTS, candidates)
    assert [f.mode for f in found][-1] == "reuse"
    nearness = [f.kl for f in found if f.kl is not None]
    assert nearness == sorted(nearness) and nearness[0] == pytest.approx(0, abs=1e-6)
    assert nearness[-1] > 1e-3


def test_the_grid_is_the_authors() -> None:
    grid = ape_grid()
    assert len(grid) == 25 and set(grid.values()) >= {APE(0.6, 1.0), APE(1.0, 1.0)}
    assert all(blender(mode) == made for mode, made in grid.items())


def test_questions_come_from_many_contexts() -> None:
    many = [Context(c.chunks, c.questions * 5) for c in CONTEXTS]
    assert [len(c.questions) for c in spread(many, 4)] == [2, 2]
    assert [len(c.questions) for c in spread(many, 2)] == [1, 1]
    with pytest.raises(ConfigError, match="at least 1"):
        spread(many, 0)
