"""Every error message that a user can meet is listed, and says what, why and the fix.

That the tests really meet each of them, by CLI, REST or Python, is seen at the end of a run of all
fast tests (tests/conftest.py): one that no test meets fails the run unless the list says why.
"""

from __future__ import annotations

import re

import pytest

from ragcache.errors import ConfigError, StoreError
from tests.errors import Met, Site, listed, sites


def test_every_message_is_on_the_list() -> None:
    found, known = {site.entry for site in sites()}, set(listed())
    assert (found - known, known - found) == (set(), set()), "run python -m tests.errors"


@pytest.mark.parametrize("site", [s for s in sites() if s.own], ids=lambda site: site.entry)
def test_a_message_says_more_than_what_happened(site: Site) -> None:
    """What is wrong, and after a colon, semicolon, comma or full stop what to do about it."""
    said = re.sub(r"\{(?:[^{}]|\{[^{}]*\})*\}", "X", site.text)
    assert re.search(r"\w\W*(?:[:;.,] +\W*\w+\W+\w|[.] X$)", said), "say what to do about it"


def test_what_is_not_met_has_a_reason() -> None:
    assert all(len(reason.split()) > 2 for reason in listed().values() if reason)


def test_places_are_seen() -> None:
    class Wrong(ConfigError):
        pass

    met = Met()
    met.watch(Wrong)
    error = Wrong("a message: do something")
    assert str(error) == "a message: do something" and len(met.places) == 1
    assert str(StoreError("other", key=b"k")) == "other" and len(met.places) == 1
