"""The pictures of docs/architecture.md are those that the code makes, and are plain SVG."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.pages import ROOT
from tests.structure import room_graph

FIGURES = ROOT / "docs" / "figures"
MADE = "import json, picture; print(json.dumps({n: p() for n, p in picture.PICTURES.items()}))"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    command = [sys.executable, "-c", MADE]
    done = subprocess.run(
        command, cwd=ROOT / "docs" / "site", check=True, capture_output=True, text=True
    )
    pictures: dict[str, str] = json.loads(done.stdout)
    return pictures


def test_pictures_are_up_to_date(made: dict[str, str]) -> None:
    old = [n for n in made if made[n] != (FIGURES / n).read_text(encoding="utf-8")]
    assert old == [], "run `make pages`"


def test_every_package_is_in_the_picture(made: dict[str, str]) -> None:
    root = ElementTree.fromstring(made["packages.svg"])
    shown = [node.text for node in root.iter() if node.get("class") == "name"]
    assert sorted(map(str, shown)) == sorted(room_graph())


def test_pictures_load_nothing(made: dict[str, str]) -> None:
    for name, text in made.items():
        tags = {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(text).iter()}
        assert tags.isdisjoint({"script", "image", "use", "foreignObject"}), name
        assert text.count("http") == 1, name  # the name of the namespace
