"""Messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragcache.errors import PromptError
from ragcache.types import Segment

__all__ = ["ChatMessage"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]*")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a chat. ``fields`` are its other keys that a template may read, such as
    ``tool_calls``."""

    role: str
    content: tuple[Segment, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, role: str, text: str, **fields: Any) -> ChatMessage:
        """A message whose content is one text."""
        return cls(role, (Segment(text),) if text else (), fields)

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.content)


def check_messages(
    messages: Sequence[ChatMessage],
    tools: Sequence[Mapping[str, Any]],
    words: Collection[str],
    control: Collection[str],
) -> None:
    """Raise PromptError for a role that is neither usual nor one of the template's ``words``, and
    for a key that contains a ``control`` token: templates write both as they are."""
    for index, message in enumerate(messages):
        known = message.role in _ROLES or message.role in words
        if not known or not _ROLE.fullmatch(message.role):
            raise PromptError(
                f"message {index + 1} of {len(messages)} has the role {message.role!r}, which the "
                f"chat template does not know: use {', '.join(_ROLES)}."
            )
    for key in _keys([*(message.fields for message in messages), *tools]):
        if any(name in key for name in control):
            raise PromptError(
                f"the key {key!r} of a tool or message contains a control token of the model: "
                "rename it."
            )


def with_strings(value: Any, changed: Callable[[str], str]) -> Any:
    """``value``, which is like JSON, with its strings changed, but not the keys."""
    if isinstance(value, str):
        return changed(value)
    if isinstance(value, Mapping):
        return {key: with_strings(one, changed) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_strings(one, changed) for one in value]
    return value


def _keys(value: Any) -> Iterator[str]:
    """All keys in ``value``, which is like JSON."""
    if isinstance(value, Mapping):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _keys(one)
