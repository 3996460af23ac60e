"""Chat templates that put the day's date into the prompt: on which day they are rendered."""

from __future__ import annotations

import json
from datetime import date, datetime

_CLOCK = "strftime_now"  # what transformers calls its clock in templates
_FORMATS = [f"%{flag}{letter}" for letter in "aAbBcdDeFGHIjmMpSTuUVwWxXyYZ" for flag in ("-", "")]


def asks(chat_template: str) -> bool:
    """Whether a template may ask for the date."""
    return _CLOCK in chat_template


def on(chat_template: str, day: date) -> str:
    """The same template, with its clock standing at the beginning of ``day``.

    transformers takes no clock from its caller, so the template gets one of its own: a macro that
    writes what ``strftime`` writes. The newline behind it belongs to its tag and is not rendered.
    """
    midnight = datetime(day.year, day.month, day.day)
    written = [f"replace({json.dumps(f)}, {json.dumps(midnight.strftime(f))})" for f in _FORMATS]
    clock = " | ".join(["format", *written])
    return f"{{% macro {_CLOCK}(format) %}}{{{{ {clock} }}}}{{% endmacro %}}\n{chat_template}"
