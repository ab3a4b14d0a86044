"""List the speeds that a study needs: those of the shapes of its cells, each once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..cells import Cell
from ..recipe import CompareRecipe
from .shapes import FfnShape


@dataclass(frozen=True)
class Wanted:
    """A shape, and the program to run it."""

    program: str
    shape: FfnShape

    @property
    def label(self) -> str:
        """Its label, such as ``llama.cpp: 12 of 32 + 1/8``."""
        return f"{self.program}: {self.shape.name}"


def wanted_speeds(recipe: CompareRecipe, cells: Iterable[Cell]) -> list[Wanted]:
    """Return program and shape for every cell that can be stored."""
    plans = [cell.plan for cell in cells if cell.plan is not None and cell.simulated is None]
    return list(dict.fromkeys(Wanted(program, FfnShape.of(plan)) for program in recipe.speed for plan in plans))
