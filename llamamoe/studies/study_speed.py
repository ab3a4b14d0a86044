"""Measure the speeds of a study: each shape once, then assigned to the rows with this shape."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.locate import Location
from ..progress import Progress, ProgressCallback
from .cells import Cell
from .recipe import CompareRecipe
from .speed.measure import DENSE, SHAPE
from .speed.runtimes import runtime
from .speed.shapes import MODEL_SHAPES, SOURCE, FfnShape
from .speed.store import SpeedStore
from .speed.wanted import Wanted, wanted_speeds
from .table import Row


class StudySpeed:
    """The measurements of the shapes of a study's cells.

    Args:
        recipe: The study.
        cells: Its cells.
        folder: Folder of the results.
        location: The source.
        tokenizer: For a GGUF source, a folder whose tokenizer is used instead of the one in the file.

    Raises:
        MissingExtraError: A program is not installed.
    """

    def __init__(
        self,
        recipe: CompareRecipe,
        cells: Sequence[Cell],
        folder: Path,
        location: Location,
        *,
        tokenizer: str | Path | None = None,
    ) -> None:
        self._recipe, self._cells = recipe, cells
        self._store: SpeedStore | None = None
        if recipe.speed:
            for program in recipe.speed:
                runtime(program)  # refused before the study starts
            model = location.path if recipe.speed_shape == SOURCE else MODEL_SHAPES[recipe.speed_shape]
            self._store = SpeedStore(folder, model, tokenizer=tokenizer)

    def measure(self, labels: Set[str], progress: ProgressCallback) -> tuple[str, ...]:
        """Measure missing speeds of the cells with these labels; return the failed ones with reasons."""
        if self._store is None:
            return ()
        wanted = wanted_speeds(self._recipe, [cell for cell in self._cells if cell.label in labels])
        done, total = 0, self._store.readings(wanted)

        def tell(text: str) -> None:
            nonlocal done
            done += 1
            progress(Progress("speed", min(done, total), total, "reading", text))

        failed = self._store.measure(wanted, tell)
        return tuple(f"not measured: {each.label}: {reason}" for each, reason in failed)

    def results(self) -> tuple[dict[str, Any], ...]:
        """Return all measurements of the study's shapes, without their dependencies."""
        if self._store is None:
            return ()
        found = (self._store.load(each) for each in wanted_speeds(self._recipe, self._cells))
        return tuple({k: v for k, v in each.items() if k != "depends"} for each in found if each is not None)

    def given_to(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Return the rows with the speeds of their shapes; the dense row has the dense model's own rates."""
        if self._store is None:
            return tuple(rows)
        shapes = {
            (cell.method, cell.budget): FfnShape.of(cell.plan)
            for cell in reversed(self._cells)
            if cell.plan is not None and cell.simulated is None
        }
        return tuple(replace(row, speed=self._speed(row, shapes.get((row.method, row.budget)))) for row in rows)

    def _speed(self, row: Row, shape: FfnShape | None) -> dict[str, dict[str, dict[str, float]]]:
        assert self._store is not None
        if row.kind == DENSE:
            return _dense(self.results())
        found: dict[str, dict[str, dict[str, float]]] = {}
        for program in self._recipe.speed if shape is not None else ():
            result = self._store.load(Wanted(program, shape)) if shape else None
            if result is not None:
                found[program] = result["rates"][SHAPE]
        return found


def _dense(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the dense model's rates, the median over all runs."""
    found: dict[str, dict[str, list[float]]] = {}
    for each in results:
        for task, rate in each["rates"][DENSE].items():
            found.setdefault(each["program"], {}).setdefault(task, []).append(rate["tokens_per_second"])
    one = {"ratio": 1.0, "lowest": 1.0, "highest": 1.0}
    return {
        program: {task: {"tokens_per_second": statistics.median(rates), **one} for task, rates in tasks.items()}
        for program, tasks in found.items()
    }
