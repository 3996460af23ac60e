"""A chat template that does not end is refused, and others are rendered as usual."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from ragcache.engine import rendering
from ragcache.engine.template import split_chat_template
from ragcache.errors import ModelError
from tests import models

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{{ ('a' * 9000000000) | length }}"
DOUBLES = (
    "{% set ns = namespace(s='a') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}"
)


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def rendered(template: str) -> Any:
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.chat_template = template
    return split_chat_template(tokenizer, lambda text, **_: tuple(text.encode()))


@pytest.mark.parametrize(
    "template",
    [pytest.param(LOOPS, marks=pytest.mark.slow), GROWS, DOUBLES],  # it takes its five seconds
    ids=["loops", "grows", "doubles"],
)
def test_a_template_that_does_not_end_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="chat template does not end within 5 seconds and 1024 Mi"):
        rendered(template)


def test_a_process_that_says_nothing_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_WAIT_S", 0.1)
    with pytest.raises(ModelError, match="chat template does not end"):
        rendered(LOOPS)


@pytest.mark.parametrize(
    ("template", "error"),
    [("{% if %}", "TemplateSyntaxError: Expected"), ("{{ messages + 1 }}", "TypeError: can only")],
)
def test_a_broken_template_is_said_to_be(template: str, error: str) -> None:
    with pytest.raises(
        ModelError, match=rf"the chat template is broken \(.*{error}.*Change chat_template"
    ):
        rendered(template)


def test_a_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    first = rendered(template)
    monkeypatch.setattr(
        rendering, "_render_in_subprocess", lambda *_: pytest.fail("it is tried again")
    )
    assert (rendered(template).before, first.after) == (first.before, "|")
