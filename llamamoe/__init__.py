"""Turn a trained dense LLaMA-style language model into a sparse mixture of experts that plain transformers loads.

    import llamamoe

    recipe = llamamoe.load_recipe(given={"num_experts": 8, "top_k": 2, "method": "kmeans"})
    llamamoe.split("path/to/dense", "path/to/moe", recipe)

Importing this package imports neither torch nor transformers; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .conversion import SplitResult, plan_conversion, split
    from .errors import CheckpointError, LlamaMoeError, RefusedError, UsageError, VerificationError
    from .recipe import SplitRecipe, load_recipe
    from .verification import Verification, verify

_PLACES = {
    "split": "conversion",
    "plan_conversion": "conversion",
    "SplitResult": "conversion",
    "verify": "verification",
    "Verification": "verification",
    "SplitRecipe": "recipe",
    "load_recipe": "recipe",
    "LlamaMoeError": "errors",
    "UsageError": "errors",
    "RefusedError": "errors",
    "CheckpointError": "errors",
    "VerificationError": "errors",
}

__all__ = [
    "CheckpointError",
    "LlamaMoeError",
    "RefusedError",
    "SplitRecipe",
    "SplitResult",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "load_recipe",
    "plan_conversion",
    "split",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
