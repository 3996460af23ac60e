"""The options that ask and stream take are the fields of a request."""

from __future__ import annotations

from dataclasses import fields

from ragcache.core.request import Request, RequestOptions


def test_every_option_is_a_field_of_the_same_type() -> None:
    options = RequestOptions.__annotations__
    written = {name: getattr(kind, "__forward_arg__", kind) for name, kind in options.items()}
    question, *others = fields(Request)
    assert question.name == "question"
    assert written == {field.name: field.type for field in others}
