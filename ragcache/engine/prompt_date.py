"""Render chat templates that contain the current date as if it were a given day."""

from __future__ import annotations

import json
from datetime import date, datetime
from string import ascii_letters

_CLOCK = "strftime_now"  # the function for the current date that transformers offers to templates
_FORMATS = [f"%{flag}{letter}" for letter in ascii_letters for flag in ("", *"-_0^#")]
_PERCENT = "%\ue000"  # stands for %% while the other codes are replaced


def uses_date(chat_template: str) -> bool:
    """Whether a chat template may use the current date."""
    return _CLOCK in chat_template


def with_fixed_date(chat_template: str, day: date) -> str:
    """The same template, in which the current time is the beginning of ``day``.

    transformers has no parameter for the date, so a macro replaces its function: it formats the
    date as ``strftime`` does. The newline after the macro belongs to its tag and is not rendered.
    """
    midnight = datetime(day.year, day.month, day.day)
    formatted = [("%%", _PERCENT), *((f, midnight.strftime(f)) for f in _FORMATS), (_PERCENT, "%")]
    clock = (
        "{% set made = namespace(text=format) %}"
        f"{{% for code, value in {json.dumps(formatted)} %}}"
        "{% set made.text = made.text | replace(code, value) %}{% endfor %}{{ made.text }}"
    )
    return f"{{% macro {_CLOCK}(format) %}}{clock}{{% endmacro %}}\n{chat_template}"
