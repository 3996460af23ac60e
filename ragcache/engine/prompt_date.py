"""Chat templates that put the day's date into the prompt: on which day they are rendered."""

from __future__ import annotations

import json
from datetime import date, datetime
from string import ascii_letters

_CLOCK = "strftime_now"  # what transformers calls its clock in templates
_FORMATS = [f"%{flag}{letter}" for letter in ascii_letters for flag in ("", *"-_0^#")]
_PERCENT = "%\ue000"  # a %% while the others are written


def asks(chat_template: str) -> bool:
    """Whether a template may ask for the date."""
    return _CLOCK in chat_template


def on(chat_template: str, day: date) -> str:
    """The same template, with its clock standing at the beginning of ``day``.

    transformers takes no clock from its caller, so the template gets one of its own: a macro that
    writes what ``strftime`` writes. The newline behind it belongs to its tag and is not rendered.
    """
    midnight = datetime(day.year, day.month, day.day)
    written = [("%%", _PERCENT), *((f, midnight.strftime(f)) for f in _FORMATS), (_PERCENT, "%")]
    clock = (
        f"{{% set made = namespace(text=format) %}}{{% for said, meant in {json.dumps(written)} %}}"
        "{% set made.text = made.text | replace(said, meant) %}{% endfor %}{{ made.text }}"
    )
    return f"{{% macro {_CLOCK}(format) %}}{clock}{{% endmacro %}}\n{chat_template}"
