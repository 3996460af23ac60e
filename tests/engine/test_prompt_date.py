"""Chat templates with a date: a store keeps its own date."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ragcache import setup
from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.engine import prompt_date as module
from ragcache.engine import template as templates
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.template import split_chat_template
from ragcache.errors import ConfigError
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store.catalog.catalog import Catalog
from ragcache.store.disk.store import DiskStore
from tests import models, scene
from tests.cli.test_commands import Run, notes, run
from tests.engine.test_template import CHATML

__all__ = ["notes", "run"]  # fixtures

TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: As Llama 3.2, SmolLM3 and gpt-oss ask for it.
LLAMA = (
    "{{- bos_token }}\n{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "Today Date: {{ date_string }}\n\n" + TURNS
)
SMOLLM = '{%- set today = strftime_now("%d %B %Y") -%}\n  Today Date: {{ today }}\n' + TURNS
GPT_OSS = (
    "{%- macro system() -%}Current date: {{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}"
    "{{ system() }}\n" + TURNS
)
UNUSED = '{%- if false %}{{ strftime_now("%Y") }}{%- endif %}' + TURNS
DATED = {LLAMA: "30 Nov 2026", SMOLLM: "30 November 2026", GPT_OSS: "2026-11-30"}
DAY = date(2026, 11, 30)


def with_template(template: str) -> Any:
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def tokenize(text: str, *, control: bool = False) -> tuple[int, ...]:
    return tuple(models.tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template", DATED)
def test_a_template_has_the_date_that_it_is_told(template: str) -> None:
    made = split_chat_template(with_template(template), tokenize, DAY)
    assert made.day == DAY and DATED[template] in made.before
    other = split_chat_template(with_template(template), tokenize, date(2031, 2, 3))
    assert other.before != made.before and other.after == made.after


@pytest.mark.parametrize(
    "template", [*DATED, UNUSED, "  {% if true %}\n\n x {% endif %}\n" + TURNS]
)
def test_it_is_what_transformers_renders_today(template: str) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    ours, theirs = (
        with_template(source).apply_chat_template(messages, tokenize=False)
        for source in (module.with_fixed_date(template, date.today()), template)
    )
    assert ours == theirs


@pytest.mark.parametrize("template", [CHATML, UNUSED])
def test_a_template_without_a_date_has_none(template: str) -> None:
    today, later = (split_chat_template(with_template(template), tokenize, d) for d in (None, DAY))
    assert today.day is later.day is None and today.before == later.before


def test_every_format_is_written_as_strftime_does() -> None:
    formats = (
        "%a %A %b %B %d %-d %m %-m %y %Y %j %H:%M:%S %I%p %F %h %C %D %R %r %k %_d %^a %% %%d %%%d"
    )
    template = f"{{{{ strftime_now('{formats}') }}}}" + TURNS
    made = split_chat_template(with_template(template), tokenize, DAY)
    assert made.before.startswith(datetime(2026, 11, 30).strftime(formats))


@pytest.mark.parametrize("format", ["%A", "%a", "%B", "%d", "%-m", "%y", "%j", "%U", "%p"])
def test_a_part_of_a_date_is_one_on_every_day(format: str) -> None:
    """Whatever that day has in common with another: its weekday, its month, its number."""
    template = f"{{{{ strftime_now('{format}') }}}}" + TURNS
    given = [date(1987, 3, 7), date(1999, 10, 25), date(2026, 11, 28), date(2027, 3, 7), DAY]
    found = [split_chat_template(with_template(template), tokenize, day).day for day in given]
    assert found == ([None] * 5 if format == "%p" else given)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[date], None]:
    """Make it that day."""

    def set_day(day: date) -> None:
        class Day(date):
            @classmethod
            def today(cls) -> Any:
                return day

        monkeypatch.setattr(setup, "date", Day)
        monkeypatch.setattr(templates, "date", Day)

    return set_day


def opened(path: Path, template: str = LLAMA, **settings: Any) -> RagCache:
    engine = TransformersEngine(models.model("llama"), with_template(template), name="llama")
    given = Settings(max_tokens=2, ratio=0.15, **settings)
    return RagCache(engine, DiskStore(path), HashEmbedder(), path, given)


def test_a_store_is_used_on_the_next_day(tmp_path: Path, on: Callable[[date], None]) -> None:
    on(date(2026, 11, 29))
    with opened(tmp_path) as cache:
        cache.add(scene.DOCUMENTS)
        first = cache.ask("Who keeps a parrot?")
    on(date(2026, 12, 1))
    with opened(tmp_path) as cache:
        assert cache.template.day == date(2026, 11, 29) != cache.engine.template.day
        answer = cache.ask("Who keeps a parrot?")
        assert answer.prompt == first.prompt and not answer.report.fallbacks
        assert cache.add(scene.DOCUMENTS).precomputed.encoded == 0
    with opened(tmp_path, prompt_date="today") as cache:
        assert cache.template.day == date(2026, 12, 1)
        assert cache.add(scene.DOCUMENTS).precomputed.encoded > 3
    with opened(tmp_path) as cache:
        assert not cache.ask("Who keeps a parrot?").report.fallbacks
        assert cache.ask("Who?").prompt.prefix == cache.engine.template.prefix


def test_an_old_store_without_a_date_goes_on(tmp_path: Path, on: Callable[[date], None]) -> None:
    """Its chunks keep their keys where the template has none; else today's is taken, once."""
    for template, computed in ((CHATML, False), (LLAMA, True)):
        path = tmp_path / str(computed)
        on(date(2026, 11, 29))
        with opened(path, template) as cache:
            cache.add(scene.DOCUMENTS)
            cache.catalog.drop_setting(setup.PROMPT_DATE)
        on(date(2026, 12, 1))
        for n in range(2):
            with opened(path, template) as cache:
                encoded = cache.add(scene.DOCUMENTS).precomputed.encoded
                assert bool(encoded) == (computed and not n)
                assert (cache.template.day is not None) == computed


def test_each_tenant_has_its_own(tmp_path: Path, on: Callable[[date], None]) -> None:
    on(date(2026, 11, 29))
    with Service(opened(tmp_path, store=tmp_path), Scheduler()) as service:
        own = service.cache("")
        on(date(2026, 12, 1))
        late = service.cache("late")
        assert (own.template.day, late.template.day) == (date(2026, 11, 29), date(2026, 12, 1))
        late.add(scene.DOCUMENTS)
        assert late.ask("Who?").prompt.prefix == late.indexing.prefix_key.tokens
        assert not late.ask("Who?").report.fallbacks


def test_the_command_line_says_it(
    run: Run, notes: Path, tmp_path: Path, on: Callable[[date], None]
) -> None:
    on(date(2026, 11, 29))
    models.model("llama").save_pretrained(tmp_path / "dated")
    tokenizer: PreTrainedTokenizerFast = with_template(LLAMA)
    tokenizer.save_pretrained(tmp_path / "dated")
    code, out, err = run("index", notes, "--model", tmp_path / "dated")
    assert code == 0 and "a date into the prompt: this store keeps 2026-11-29" in err
    on(date(2026, 12, 1))
    code, out, err = run("index", notes)
    assert code == 0 and "KV of 0 chunks" in out and "this store keeps 2026-11-29" in err
    assert "date in the prompt: 2026-11-29" in run("stats")[1]
    assert "2026-11-29: kept" in run("doctor")[1]
    assert "the prompt has a date" in run("models", "--model", tmp_path / "dated")[1]
    code, _, err = run("query", "Who?", "--max-tokens", 2)
    assert code == 0 and "computed, not loaded" not in err
    code, _, err = run("precompute", notes, "--dry-run", "--prompt-date", "today")
    assert code == 1 and "leave one of them out" in err
    code, out, err = run("index", notes, "--prompt-date", "2027-01-02")
    assert code == 0 and "this store keeps 2027-01-02" in err and "KV of 0 chunks" not in out
    with DiskStore(tmp_path / "ragcache-store", readonly=True) as store:
        assert Catalog(store).get_setting(setup.PROMPT_DATE) == "2027-01-02"


def test_a_date_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt_date = '2026-13-45' is not valid"):
        Settings.load(prompt_date="2026-13-45")
