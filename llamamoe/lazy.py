"""Import heavy packages when one of their names is first used, so that `--help` and plans do not wait for torch.

    from ..lazy import np, torch

Modules that cannot be used without torch (subclasses of its modules, of transformers' Trainer) import it as usual.
"""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import LlamaMoeError, MissingExtraError

# the packages; type checkers only allow importing names in this list
__all__ = [
    "accelerate",
    "dist",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "np",
    "peft",
    "psutil",
    "pymetis",
    "safetensors",
    "scipy",
    "sklearn",
    "threadpoolctl",
    "tokenizers",
    "torch",
    "transformers",
]

if TYPE_CHECKING:
    import accelerate
    import accelerate.hooks
    import accelerate.utils
    import gguf
    import huggingface_hub
    import huggingface_hub.errors
    import jinja2
    import lm_eval
    import matplotlib
    import matplotlib.axes
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import matplotlib.ticker
    import numpy as np
    import peft
    import psutil
    import pymetis
    import safetensors
    import safetensors.torch
    import scipy
    import scipy.sparse
    import scipy.stats
    import sklearn
    import sklearn.cluster
    import threadpoolctl
    import tokenizers
    import torch
    import torch.distributed as dist
    import transformers
    import transformers.activations
    import transformers.core_model_loading
    import transformers.integrations.moe
    import transformers.utils


OLDEST_TRANSFORMERS = "5.22"
"""As in setup.cfg. Another package that is installed later can replace it by an older version."""


def check_transformers() -> None:
    """Refuse an installed transformers that is too old; it would fail later, with errors that do not name the cause.

    Raises:
        LlamaMoeError: It is older than `OLDEST_TRANSFORMERS`.
    """
    from importlib import metadata  # takes longer than the help of a command

    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:  # on the path without having been installed
        return
    if _release(installed) < _release(OLDEST_TRANSFORMERS):
        raise LlamaMoeError(
            f"transformers {installed} is installed, but llamamoe needs {OLDEST_TRANSFORMERS} or newer.",
            hint=f"Update it: pip install --upgrade 'transformers>={OLDEST_TRANSFORMERS},<6'. What llamamoe writes also loads in "
            "transformers 4.57, in another environment.",
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


class Lazy(ModuleType):
    """A placeholder for a package that is imported on first access of an attribute; submodules are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(sys.modules[self.__name__], name)  # already imported: import_module would take 2 us
        except (KeyError, AttributeError):
            if self.__name__ == "transformers":
                check_transformers()
            module = importlib.import_module(self.__name__)
        try:
            return getattr(module, name)
        except AttributeError:
            if name.startswith("__"):
                raise
        try:
            return importlib.import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


if not TYPE_CHECKING:
    _CALLED = {"np": "numpy", "dist": "torch.distributed"}
    globals().update({name: Lazy(_CALLED.get(name, name)) for name in __all__})


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a module of a package that only an extra installs.

    Args:
        module: Its dotted name.
        extra: The extra of llamamoe that installs it.
        purpose: The purpose, as the beginning of a sentence.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.split(".")[0], extra, purpose) from error
