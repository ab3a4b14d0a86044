"""Find the models that a recipe names, and name its keys in errors about their values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.locate import Location, locate, locate_folder
from ..errors import LlamaMoeError
from .recipe import PretrainRecipe


@contextmanager
def of_key(key: str, way: str) -> Iterator[None]:
    """Name a recipe's key, and how to change its value, in an error about the value.

    Raises:
        LlamaMoeError: The error, of the same class.
    """
    try:
        yield
    except LlamaMoeError as error:
        change = f"It is {key} of the recipe; {way} replaces it."
        raise type(error)(error.message, hint=f"{error.hint} {change}" if error.hint else change) from None


def find_models(recipe: PretrainRecipe) -> tuple[Location, Path | None]:
    """Return the model to train and the path of its dense parent, if the recipe names one.

    Raises:
        CheckpointError, LlamaMoeError: See `locate`.
    """
    with of_key("model", "--model"):
        model = locate_folder(recipe.model)
    if recipe.parent is None:
        return model, None
    with of_key("parent", "--parent"):
        return model, locate(recipe.parent).path
