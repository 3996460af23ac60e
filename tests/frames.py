"""The package's own stack frames between a question and the model's forward.

``python -m tests.frames`` prints them, for each way in which a question comes.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ragcache import Document, RagCache
from ragcache.api.service import Service
from ragcache.core.request import Request
from ragcache.langchain import ChatRagCache
from ragcache.settings import ServiceSettings, Settings
from tests.structure import PACKAGE

_QUESTION = "Where does Mira Holt live?"


@contextmanager
def watched(model: nn.Module) -> Iterator[list[list[str]]]:
    """While this lasts, the stack of every forward is added to the list: the package's own frames,
    as ``module:function``, from the door to the forward."""
    stacks: list[list[str]] = []

    def before(*_: object) -> None:
        frame, own = sys._getframe(1), list[str]()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                own.append(f"{path.relative_to(PACKAGE).with_suffix('')}:{frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        stacks.append(own[::-1])

    handle = model.register_forward_pre_hook(before)
    try:
        yield stacks
    finally:
        handle.remove()


def filled(folder: Path) -> Path:
    """A store that has answered a question before: the first one measures the machine's speeds."""
    with RagCache.open(folder) as cache:
        cache.add([Document("a", "Mira Holt lives in Oslo.")])
        cache.ask(_QUESTION)
    return folder


def by_python(folder: Path) -> list[str]:
    with RagCache.open(folder) as cache, watched(_model(cache)) as stacks:
        cache.ask(_QUESTION)
    return stacks[0]


def by_service(folder: Path) -> list[str]:
    """From the thread of the engine, which the HTTP handlers hand a question over to."""
    done = threading.Event()

    def told(kind: str, what: object) -> None:
        if kind != "piece":
            done.set()

    settings = Settings.load(store=folder)
    with (
        Service.open(settings, ServiceSettings.load()) as service,
        watched(_model(service.default_cache)) as stacks,
    ):
        service.submit("", Request(_QUESTION), told)
        done.wait()
        return stacks[0]


def by_langchain(folder: Path) -> list[str]:
    """From the thread of the engine, too."""
    with RagCache.open(folder) as cache, watched(_model(cache)) as stacks:
        ChatRagCache(store=cache).invoke(_QUESTION)
        return stacks[0]


DOORS: dict[str, Callable[[Path], list[str]]] = {
    "Python": by_python,
    "REST": by_service,
    "LangChain": by_langchain,
}


def _model(cache: RagCache) -> nn.Module:
    engine: Any = cache.engine
    model: nn.Module = engine.model
    return model


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = filled(Path(name))
        for door, run in DOORS.items():
            frames = run(folder)
            sys.stdout.write(f"{door}: {len(frames)} frames: {' > '.join(frames)}\n")


if __name__ == "__main__":
    main()
