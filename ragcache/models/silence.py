"""What the libraries below would print while they load."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence_transformers(*, bar: bool = False) -> Iterator[None]:
    """What transformers has to say of loading is ours to say: no warnings and, unless ``bar``, no
    bar of progress."""
    from transformers.utils import logging as said

    level, shown = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    if not bar:
        said.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        said.set_verbosity(level)
        if shown:
            said.enable_progress_bar()
