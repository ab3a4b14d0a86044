"""The texts of the experts in the plan of a mix: files that exist, hold enough, and differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...conversion.calibration_cost import most_tokens
from ...errors import LlamaMoeError
from .recipe import MixRecipe


@contextmanager
def text_of(expert: int, model: str) -> Iterator[None]:
    """Name the expert in errors about its text."""
    try:
        yield
    except LlamaMoeError as error:
        error.message = f"the text of expert {expert} ({model}): {error.message}"
        raise


def check_texts(recipe: MixRecipe) -> None:
    """Find the files of each expert's text, without opening them.

    Raises:
        UsageError: There are none, or they cannot hold enough tokens.
    """
    for expert, (model, paths) in enumerate(zip(recipe.experts, recipe.texts or (), strict=False)):
        with text_of(expert, model):
            most_tokens(paths)
