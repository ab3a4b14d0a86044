"""``llamamoe.compare``: compare many conversions of one model under the same conditions, with controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.dense_checkpoint import DenseModel, understand
from ..architectures.rescales import RESCALES
from ..calibration.reading import document_hash, shared_documents
from ..checkpoint.contents import content_fingerprint
from ..checkpoint.locate import Location, locate, open_checkpoint
from ..checkpoint.paths import refuse_windows_path
from ..conversion.recipe import AUTO, NO_REPAIR
from ..data.files import find_files, unpacked_bytes
from ..data.text import Document, read_documents
from ..errors import RefusedError
from ..methods.repairs import REPAIRS
from ..methods.routers import ROUTERS
from ..methods.selectors import SELECTORS
from ..methods.splitters import SPLITTERS
from ..models.devices import check_device
from ..progress import ProgressCallback, ignore_progress
from .budget.sensitivities import SENSITIVITIES
from .cells import Cell, cells_of, estimated_flops, select
from .recipe import CompareRecipe
from .speed.wanted import wanted_speeds
from .store import CellStore, Dependencies, cell_facts, code_version
from .table import Comparison

if TYPE_CHECKING:
    from .engine import Engine

_MOST_TEXT = 1 << 27
"""Bytes of text up to which a plan looks for documents in both texts: a second or two."""
NOMINAL_FLOPS = 5e10
"""Floating-point operations per second for estimates of time, until a cell has been measured."""


@dataclass(frozen=True)
class PlannedCell:
    """One line of ``--dry-run``.

    Attributes:
        label: ``method/budget/seed``.
        kind: ``"dense"``, ``"method"`` or ``"control"``.
        simulated: Reason why it cannot be stored; None if it can.
        share: Active share of the FFN's multiply-adds.
        sizes: ``"7 of 24, 416 shared"`` as numbers: num_experts, top_k, expert_width, shared.
        flops: Estimate of its floating-point operations.
        seconds: Estimate of its time.
        finished: Whether a result of the same recipe, code and source exists (the text is not compared).
    """

    label: str
    kind: str
    simulated: str | None
    share: float
    sizes: dict[str, int]
    flops: int
    seconds: float
    finished: bool


@dataclass(frozen=True)
class ComparisonPlan:
    """The plan of `compare`.

    Attributes:
        source: Name of the dense model.
        cells: Cells in the order of execution.
        flops_per_second: Rate behind the estimates of time.
        rate_measured: Whether it comes from finished cells.
        speeds: Programs and shapes whose speed is measured, about two minutes for three shapes.
        warnings: Sentences on the texts.
    """

    source: str
    cells: tuple[PlannedCell, ...]
    flops_per_second: float
    rate_measured: bool
    speeds: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float:
        """Estimated seconds of the unfinished cells."""
        return sum(cell.seconds for cell in self.cells if not cell.finished)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return asdict(self) | {"seconds_left": self.seconds_left}


def plan_comparison(
    source: str | Path,
    recipe: CompareRecipe,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    tokenizer: str | Path | None = None,
) -> ComparisonPlan:
    """List the cells with an estimate of their cost; reads headers only. For the arguments see `compare`.

    Raises:
        RefusedError: A method is not possible at a budget, where the message names every case, or ``out`` is a model.
        UsageError: A text does not exist, or ``only`` matches nothing.
        MissingExtraError: A program whose speed is measured is not installed.
    """
    _check_out(out or "")
    check_device(recipe.device)
    location, model = _open(source, tokenizer)
    everything = cells_of(recipe, model)
    cells = select(everything, only)
    domains = len({domain for _, domain in find_files(recipe.evaluation)})
    warnings = recipe.unused_sizes()
    warnings += _overlap(recipe) if recipe.calibration and recipe.calibration != (AUTO,) else ()
    parent = next(cell.plan for cell in everything if cell.plan is not None).parent_cost
    flops = [estimated_flops(cell, parent, recipe, domains) for cell in cells]
    found: list[dict[str, Any] | None] = [None] * len(cells)
    if out is not None:
        store, depends = CellStore(Path(out).expanduser()), _Depends(recipe, model)
        found = [store.finished_but_text(cell, depends.of(cell)) for cell in cells]
    timed = [(f, cell["seconds"]) for f, cell in zip(flops, found, strict=True) if cell and cell.get("seconds")]
    rate = sum(f for f, _ in timed) / sum(s for _, s in timed) if timed else NOMINAL_FLOPS
    rows = [
        PlannedCell(
            label=cell.label,
            kind=cell.kind,
            simulated=cell.simulated,
            share=cell.share,
            sizes=_sizes(cell),
            flops=work,
            seconds=work / rate,
            finished=result is not None,
        )
        for cell, work, result in zip(cells, flops, found, strict=True)
    ]
    if recipe.speed:
        from .speed.runtimes import runtime

        for program in recipe.speed:
            runtime(program)
    speeds = tuple(each.label for each in wanted_speeds(recipe, cells))
    return ComparisonPlan(location.name, tuple(rows), rate, bool(timed), speeds, warnings)


def compare(
    source: str | Path,
    out: str | Path,
    recipe: CompareRecipe,
    *,
    only: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Comparison:
    """Measure every method of a study at every budget with every seed, and its controls, on the same text.

    Only results are written: the dense model runs with the FFNs of a conversion in place of its own, by the
    same protocol as `llamamoe.evaluate` (``export`` also writes and measures checkpoints). The dense model and one
    conversion are in memory, in ``dtype``.

    Every finished cell is a small file in ``out``, named by a hash of its dependencies: recipe, the methods' code,
    source and text. A second call computes the missing cells; a kill loses only the running one. Speeds are separate
    cells, by shape, program and machine.

    Args:
        source: A folder, a ``.gguf`` file or a hub id.
        out: The study's folder; created if missing.
        recipe: See `llamamoe.studies.recipe.load_compare_recipe`.
        only: Run only cells whose method or label (``method/budget/seed``) matches one of these patterns; the table
            still shows all that are finished.
        tokenizer: For a GGUF source, a folder whose tokenizer is used instead of the one in the file.
        progress: Called with the progress of the study.

    Raises:
        RefusedError: The source is not one that can be converted, a method is not possible at a budget, or ``out`` is a
            model.
        UsageError: A text does not exist, documents are in both texts, or ``only`` matches nothing.
        LlamaMoeError: A text cannot be read, or ``out`` cannot be written.
        MissingExtraError: A program whose speed is measured is not installed.
    """
    from .engine import Engine
    from .run import StudyRun
    from .study_speed import StudySpeed

    _check_out(out)
    location, model = _open(source, tokenizer)
    cells = cells_of(recipe, model)
    wanted = {cell.label for cell in select(cells, only)}
    folder, depends = Path(out).expanduser(), _Depends(recipe, model)
    speed = StudySpeed(recipe, cells, folder, location, tokenizer=tokenizer)
    engine = Engine(location, recipe, folder, tokenizer=tokenizer)
    try:
        run = StudyRun(recipe, engine, folder, [(cell, depends.of(cell, engine)) for cell in cells])
        failed = run.do(wanted, progress)
    finally:
        engine.close()
    warnings = recipe.unused_sizes() + speed.measure(wanted, progress)
    return run.finish(location, failed, speed, warnings)


def _check_out(out: str | Path) -> None:
    refuse_windows_path(out)
    if str(out) and (Path(out).expanduser() / "config.json").exists():
        raise RefusedError(
            f"OUT ({out}) is a model, but a study writes results only.", hint="Choose another name, or a folder in it."
        )


def _open(source: str | Path, tokenizer: str | Path | None) -> tuple[Location, DenseModel]:
    location = locate(source)
    return location, understand(open_checkpoint(location, tokenizer=tokenizer))


def _overlap(recipe: CompareRecipe) -> tuple[str, ...]:
    """Return a warning about documents in both texts; the run refuses those that it takes, which only a tokenizer tells.

    Raises:
        UsageError: A text does not exist.
    """
    sizes = [unpacked_bytes(file for file, _ in find_files(text)) for text in (recipe.calibration, recipe.evaluation)]
    if max(sizes) > _MOST_TEXT:
        return ("the texts are too large to be compared here: the run begins with it, and refuses documents in both",)

    def documents(text: Sequence[str]) -> Iterator[Document]:
        return read_documents(text, on_bad_row=lambda _: None)

    both = shared_documents(
        {document_hash(each.text) for each in documents(recipe.calibration)}, documents(recipe.evaluation)
    )
    if not both:
        return ()
    more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
    return (
        f"{both[0]}{more} would be evaluated on and is in the calibration text, too: the run refuses documents that it takes for both",
    )


class _Depends:
    """The dependencies of a study's cells."""

    def __init__(self, recipe: CompareRecipe, model: DenseModel) -> None:
        self._study = {
            "dtype": recipe.dtype,
            "evaluation_tokens": recipe.evaluation_tokens,
            "context_length": recipe.context_length,
        }
        self._source = content_fingerprint(model.checkpoint.tensors, model.checkpoint.config)

    def of(self, cell: Cell, engine: Engine | None = None) -> Dependencies:
        """Return the dependencies of one cell; without an engine, those on text are missing."""
        return Dependencies(
            cell=cell_facts(cell),
            study=self._study,
            code=code_version(
                _plugins(cell),
                aligned=cell.plan is not None and cell.plan.recipe.align is not None,
                by_layer=cell.by_layer is not None,
            ),
            source=self._source,
            calibration=engine.calibration_hash(cell.plan) if engine and cell.plan else None,
            evaluation=engine.evaluation_hash if engine else None,
        )


def _plugins(cell: Cell) -> list[type]:
    """Return the classes of all methods in a cell."""
    if cell.plan is None:
        return []
    recipe = cell.plan.recipe
    chosen = (
        (SPLITTERS, recipe.method),
        (SELECTORS, recipe.shared_by),
        (ROUTERS, recipe.router),
        (RESCALES, recipe.rescale),
        (REPAIRS, recipe.repair),
    )
    found: list[type] = [r.get(c.name) for r, c in chosen if c is not None and (c.name != NO_REPAIR or c.name in r)]
    found += [ROUTERS.get("oracle")] if cell.oracle else []
    return found + ([SENSITIVITIES.get(cell.by_layer)] if cell.by_layer else [])


def _sizes(cell: Cell) -> dict[str, int]:
    if cell.plan is None:
        return {}
    layout = cell.plan.layout
    names = ("num_experts", "top_k", "expert_width")
    return {name: getattr(layout, name) for name in names} | {"shared": layout.num_shared}
