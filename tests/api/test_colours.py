"""The page's colours: text is readable, and everybody can distinguish the modes."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from ragcache.api import report_page

Colour = NDArray[np.float64]  # linear RGB, (3,)

#: Text on what it stands on, by the names of variables.
READ = [
    *((text, "card") for text in ("ink", "quiet", "accent", "bad", "good")),
    *((text, "page") for text in ("ink", "quiet")),
    *(("on-heat", back) for back in ("reused", "s1", "s2", "s3", "fresh")),
    ("on-accent", "accent"),
    ("ink", "warn"),
]
MODES = ["fused", "reuse", "full", "prefix", "cacheblend", "random", "other"]

#: What dichromats see of linear RGB: Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009.
SEEN = {
    "by all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_OKLAB = (  # Ottosson, 2020: linear RGB to cone responses, and their cube roots to Lab
    np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    ),
    np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    ),
)


def themes() -> dict[str, dict[str, Colour]]:
    css = (report_page.STATIC / "demo.css").read_text(encoding="utf-8")
    light, dark = (dict(_variables(block)) for block in re.findall(r":root \{(.*?)\}", css, re.S))
    return {"light": light, "dark": light | dark}


def _variables(block: str) -> list[tuple[str, Colour]]:
    return [(name, _linear(digits)) for name, digits in re.findall(r"--([\w-]+): #(\w+);", block)]


def _linear(digits: str) -> Colour:
    pairs = [d * 2 for d in digits] if len(digits) == 3 else re.findall("..", digits)
    srgb = np.array([int(pair, 16) / 255 for pair in pairs])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(one: Colour, other: Colour) -> float:
    """As WCAG 2 has it, from 1 to 21."""
    less, more = sorted((float(_LUMINANCE @ one), float(_LUMINANCE @ other)))
    return (more + 0.05) / (less + 0.05)


def oklab(colour: Colour) -> Colour:
    return np.asarray(_OKLAB[1] @ np.cbrt(_OKLAB[0] @ colour.clip(0, 1)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme: str) -> None:
    """4.5 to 1, WCAG 2.2's level AA for text; the names of modes are text too."""
    colours = themes()[theme]
    pairs = [*READ, *((mode, "card") for mode in MODES)]
    found = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: round(ratio, 2) for pair, ratio in found.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("seen", SEEN)
def test_modes_can_be_told_apart(theme: str, seen: str) -> None:
    """Those that are ticked at first differ by a tenth of the way from black to white, and any two
    by several just noticeable differences (0.02 in Oklab), to whoever looks."""
    colours = {mode: oklab(SEEN[seen] @ themes()[theme][mode]) for mode in MODES}
    far = {
        pair: float(np.linalg.norm(colours[pair[0]] - colours[pair[1]]))
        for pair in combinations(MODES, 2)
    }
    close = {
        pair: round(distance, 3)
        for pair, distance in far.items()
        if distance < (0.1 if set(pair) <= set(MODES[:3]) else 0.05)
    }
    assert close == {}
