"""Silence transformers' progress bars and reports, and limit its threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..lazy import transformers

_NO_POOL = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars and load reports while a part of a model is loaded; restore the settings afterwards.

    Transformers also loads on one thread meanwhile: in its thread pool every thread would retain freed memory
    which adds up over the layers (twice the peak on a 7B model).
    """
    verbosity, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pool = os.environ.get(_NO_POOL)
    os.environ[_NO_POOL] = "1"
    try:
        yield
    finally:
        if pool is None:
            del os.environ[_NO_POOL]
        else:
            os.environ[_NO_POOL] = pool
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
