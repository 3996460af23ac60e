"""The call path of a question is short: few stack frames before the model's forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frames import DOORS, filled


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("door", DOORS)
def test_few_frames_stand_before_the_forward(door: str, store: Path) -> None:
    entry, *between = DOORS[door](store)
    assert between[-1] == "engine/hf/engine:prefill"
    assert len(between) <= 6, (entry, between)
