"""Every method can be written as text, with its parameters."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest
import torch

from ragcache.blend import BLENDERS, blender, written
from ragcache.blend.full import Full
from ragcache.engine.hf.device import resolve_device
from ragcache.errors import ConfigError


@pytest.mark.parametrize("name", BLENDERS)
def test_parameters_have_defaults_that_text_can_be_read_as(name: str) -> None:
    for field in fields(BLENDERS[name]):
        assert field.default is not MISSING, f"{field.name} needs a default"
        assert isinstance(field.default, bool | int | float | str), f"{field.name} is not read"


@pytest.mark.parametrize("name", BLENDERS)
def test_what_is_written_is_read_as_the_same(name: str) -> None:
    made = BLENDERS[name]()
    assert made.name == name and blender(written(made)) == made


NUMBERS = [
    (name, field.name, type(field.default))
    for name, method in BLENDERS.items()
    for field in fields(method)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("value", [10**23, -(10**23), 10**400, "nan", "inf", "-inf", "1e400", True])
@pytest.mark.parametrize(("name", "parameter", "kind"), NUMBERS)
def test_numbers_that_are_none_are_refused(
    name: str, parameter: str, kind: type, value: object
) -> None:
    with pytest.raises(ConfigError, match=parameter) as said:
        blender(f"{name}:{parameter}={value}")
    assert len(str(said.value)) < 1000
    given = float(value) if isinstance(value, str) else value
    with pytest.raises(ConfigError, match=parameter):
        BLENDERS[name](**{parameter: given})


@pytest.mark.parametrize("size", ["-1", "0", "", str(10**23), "9" * 5000, "nan", "True"])
def test_full_layers_that_are_no_number_are_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="full_layers"):
        blender(f"fused+full_layers={size}")


def test_a_finished_blender_takes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a ratio or a finished blender, not both"):
        blender(Full(), 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU: use cpu"):
        resolve_device("cuda")
