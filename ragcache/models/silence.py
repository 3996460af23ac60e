"""Suppress what transformers prints while it loads a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["silence_transformers"]


@contextmanager
def silence_transformers(*, bar: bool = False) -> Iterator[None]:
    """Suppress transformers' warnings in the ``with`` block and, unless ``bar``, its progress bars.

    ragcache reports the problems of loading itself.
    """
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not bar:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
