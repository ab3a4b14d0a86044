"""The texts of the experts in the plan of a mix: files that exist, hold enough, and differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...conversion.calibration_cost import most_tokens
from ...data.files import find_files
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


def text_files(recipe: MixRecipe) -> list[frozenset[Path]]:
    """Return the files of each expert's text, without opening them; an empty list if the recipe has no texts.

    Raises:
        UsageError: There are none, or they cannot hold enough tokens.
    """
    found = []
    for expert, (model, paths) in enumerate(zip(recipe.experts, recipe.texts or (), strict=False)):
        with text_of(expert, model):
            most_tokens(paths)
            found.append(frozenset(path.resolve() for path, _ in find_files(paths)))
    return found


def alike_warnings(sources: Sequence[Hashable], what: str) -> list[str]:
    """Return a warning for every group of experts whose router rows are made from the same.

    Args:
        sources: What each expert's row is made from.
        what: Its name in the warning, in the plural.
    """
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for expert, source in enumerate(sources):
        groups[source].append(str(expert))
    return [
        f"experts {', '.join(group[:-1])} and {group[-1]} have the same {what}: the router cannot tell them apart"
        for group in groups.values()
        if len(group) > 1
    ]
