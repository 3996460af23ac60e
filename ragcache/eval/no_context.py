"""The mode ``none``: a question without its chunks, which shows what the model knows already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ragcache.blend.full import Full


@dataclass(frozen=True)
class NoContext(Full):
    """Full prefill of the same prompt without its chunks. An evaluation only: it answers nothing
    from documents, so it is not among the modes of a request."""

    name: ClassVar[str] = "none"
