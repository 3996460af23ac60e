"""Every method can be named, with its parameters, as text."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from ragcache.blend import BLENDERS, blender, written


@pytest.mark.parametrize("name", BLENDERS)
def test_parameters_have_defaults_that_text_can_be_read_as(name: str) -> None:
    for field in fields(BLENDERS[name]):
        assert field.default is not MISSING, f"{field.name} needs a default"
        assert isinstance(field.default, bool | int | float | str), f"{field.name} is not read"


@pytest.mark.parametrize("name", BLENDERS)
def test_what_is_written_is_read_as_the_same(name: str) -> None:
    made = BLENDERS[name]()
    assert made.name == name and blender(written(made)) == made
