"""Run a study: the missing cells, one after the other, and the table of all finished ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..architectures.costs import Cost
from ..checkpoint.locate import Location
from ..errors import LlamaMoeError, MissingExtraError
from ..evaluation.perplexity import protocol
from ..progress import ProgressCallback, ignore_progress
from .cells import Cell, estimated_flops
from .engine import Engine
from .meter import Meter
from .picture import draw
from .recipe import CompareRecipe
from .speed_picture import draw_speed
from .store import CellStore, Dependencies, write_file
from .study_speed import StudySpeed
from .table import Comparison, markdown, rows_of

JSON_FILE, MARKDOWN_FILE = "comparison.json", "comparison.md"


class StudyRun:
    """The finished and the missing cells of a study.

    Args:
        recipe: The study.
        engine: The engine that measures cells.
        folder: Folder of the results.
        cells: Every cell with its dependencies, in the table's order.
    """

    def __init__(
        self, recipe: CompareRecipe, engine: Engine, folder: Path, cells: Sequence[tuple[Cell, Dependencies]]
    ) -> None:
        self.recipe, self.engine, self.folder = recipe, engine, folder
        self._cells, self._depends = [cell for cell, _ in cells], {cell.label: depends for cell, depends in cells}
        self._store = CellStore(folder)
        self._results = {cell.label: self._store.load(cell, depends.key()) for cell, depends in cells}
        self._exported = _to_export(recipe, self._cells)
        self._parent: Cost = next(cell.plan for cell in self._cells if cell.plan is not None).parent_cost

    def do(self, wanted: Set[str], progress: ProgressCallback) -> list[tuple[str, str]]:
        """Run the missing cells with these labels; return label and reason of those that failed."""
        todo = [
            cell
            for cell in self._cells
            if cell.label in wanted and (self._results[cell.label] is None or self._lacks_export(cell))
        ]
        domains = len(self.engine.text.domains)
        flops = partial(estimated_flops, parent=self._parent, recipe=self.recipe, domains=domains)
        meter = Meter([flops(cell) for cell in todo], progress)
        failed: list[tuple[str, str]] = []
        for cell in todo:
            advance = meter.cell(cell.label, flops(cell))
            try:
                if self._results[cell.label] is None:
                    self._save(cell, self.engine.measure(cell, advance) | _parameters(cell, self._parent))
                if self._lacks_export(cell):
                    self._save(
                        cell,
                        (self._results[cell.label] or {}) | {"exported": self.engine.export(cell, ignore_progress)},
                    )
            except LlamaMoeError as error:
                failed.append((cell.label, str(error)))
            advance(1.0)
        self.engine.keep_alignments(cell for cell in self._cells if self._results[cell.label] is None)
        return failed

    def _lacks_export(self, cell: Cell) -> bool:
        return cell.label in self._exported and not (self._results[cell.label] or {}).get("exported")

    def _save(self, cell: Cell, result: Mapping[str, Any]) -> None:
        depends = self._depends[cell.label]
        numbers = {key: value for key, value in result.items() if key not in ("key", "depends")}
        self._results[cell.label] = self._store.save(cell, depends.key(), depends, numbers)

    def finish(
        self, location: Location, failed: list[tuple[str, str]], speed: StudySpeed, warnings: Sequence[str]
    ) -> Comparison:
        """Gather the results, and write table and pictures."""
        there = [result for result in self._results.values() if result is not None]
        bad = {label for label, _ in failed}
        pending = [label for label, result in self._results.items() if result is None and label not in bad]
        result = Comparison(
            source=location.name,
            rows=speed.given_to(rows_of(there)),
            cells=tuple({k: v for k, v in each.items() if k != "depends"} for each in there),
            pending=tuple(pending),
            failed=tuple(failed),
            protocol=protocol(self.engine.window, self.recipe.evaluation_tokens, [self.engine.text.side]),
            text=self.engine.text_facts(),
            recipe=self.recipe.model_dump(mode="json"),
            warnings=(*self.engine.warnings(), *warnings),
            files={"json": JSON_FILE, "markdown": MARKDOWN_FILE},
            speeds=speed.results(),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(row.kind != "dense" for row in result.rows):
            try:
                drawn = draw(result, self.folder) | draw_speed(result, self.folder)
                result = replace(result, files={**result.files, **drawn})
            except MissingExtraError as error:
                result = replace(result, warnings=(*result.warnings, str(error)))
        write_file(self.folder / JSON_FILE, json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
        write_file(self.folder / MARKDOWN_FILE, markdown(result))
        return result


def _parameters(cell: Cell, parent: Cost) -> dict[str, int]:
    cost = cell.plan.cost if cell.plan else parent
    return {
        "active_parameters": cost.active_parameters,
        "total_parameters": cost.total_parameters,
        "flops_per_token": cost.flops_per_token,
    }


def _to_export(recipe: CompareRecipe, cells: list[Cell]) -> set[str]:
    """Return the labels of the cells whose checkpoints are written."""
    possible = [cell for cell in cells if cell.plan is not None and cell.simulated is None]
    first = {cell.method: cell.label for cell in reversed(possible)}
    everything = {cell.label for cell in possible}
    return {"none": set(), "first": set(first.values()), "all": everything}[recipe.export]
