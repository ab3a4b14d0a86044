"""``llamamoe compare``: a study in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamamoe.errors import LlamaMoeError

from ._format import amount, duration, plural, size
from ._output import Output, output_options, saying_what_is_left
from ._recipe_options import RecipeName, recipe_file
from ._style import Command, flag, tokenizer_option
from ._tables import bullets, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.studies.compare import ComparisonPlan, PlannedCell
    from llamamoe.studies.recipe import CompareRecipe
    from llamamoe.studies.table import Comparison, Row

HELP = """Measure many conversions of SOURCE under the same conditions, with controls.

The recipe names methods, budgets, seeds and text. Sizes follow from a budget: the active multiply-adds of the FFN per
token, router and padding included, as a share of the dense FFN's. The controls are the dense model, random experts,
static pruning with and without the same repair, and each method with an oracle router.

With top_k_by_layer: proxy (or kl), a method is also simulated with a k for each layer, under the same total, by the
measured loss of each layer (see `llamamoe budget`). All targets but hunyuan_v1_moe hold one k for all layers, and
`llamamoe split` writes one.

--speed also measures how fast each shape (experts, selected experts, shared neurons) runs in the named programs:
decoding of 1 and 8 sequences and prefill, on a 1B model with random weights (6 GB of temporary files). The dense model,
static pruning and the shapes are measured in turn. llama.cpp needs the extra llamamoe[clients], in this environment or
in that of the Python interpreter named by LLAMAMOE_CLIENTS_PYTHON. Nothing else should run at the same time.

Each cell (method, budget and seed) is saved in the folder --out when it is finished. After an interruption the same
command continues, and repeats only the cells affected by a change of recipe, code or text. The folder also receives
comparison.json, comparison.md and a plot.
"""
EXAMPLES = """
llamamoe compare SOURCE --recipe smollm2 --calibration train/ --evaluation valid/ --dry-run
llamamoe compare SOURCE --recipe my.yaml --out study
llamamoe compare SOURCE --recipe my.yaml --out study --only 'token_clusters/0.5/*'
llamamoe compare SOURCE --recipe my.yaml --out small --set calibration_tokens=8192
llamamoe compare SOURCE --recipe my.yaml --out study --speed transformers,llama.cpp
"""
OWN_SHAPE = "--set 'methods=[{name: mine, method: token_clusters, num_experts: 32, top_k: 8, shared: 0.25}]'"
RECIPE, RUN = "Recipe", "Run"


@click.command(cls=Command, section="Measure", rank=1, short_help="Compare many conversions, with controls.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("source")
@flag("--recipe", group=RECIPE, metavar="FILE|NAME", required=True, type=RecipeName("compare"),
       text="A YAML file, or the name of a recipe that ships with llamamoe.")  # fmt: skip
@flag("--set", "overrides", group=RECIPE, metavar="KEY=VALUE", multiple=True,
       text="Set one key of the recipe, such as budgets=[0.5]; may be repeated.")  # fmt: skip
@flag("--calibration", group=RECIPE, metavar="PATH", multiple=True,
       text="Calibration text, instead of the recipe's: a file, folder or glob; may be repeated.")  # fmt: skip
@flag("--evaluation", group=RECIPE, metavar="PATH", multiple=True,
       text="Text to measure on, instead of the recipe's; may be repeated.")  # fmt: skip
@flag("--out", group=RUN, metavar="DIR", default="comparison", show_default=True, text="The folder of the study.")
@flag("--only", group=RUN, metavar="PATTERN", multiple=True,
       text="Run only these methods or cells (method/budget/seed, * allowed); may be repeated.")  # fmt: skip
@flag(
    "--device",
    group=RUN,
    metavar="NAME",
    text="A torch device, such as cpu or cuda:0.  [default: the recipe's, else the GPU if there is one]",
)
@flag("--export", group=RUN, type=click.Choice(["none", "first", "all"]),
       text="Also write and measure checkpoints, of the first cell of each method or of all cells.  [default: the recipe's]")  # fmt: skip
@flag(
    "--speed",
    group=RUN,
    metavar="A,B",
    text="Measure speed in transformers, llama.cpp or both.  [default: the recipe's]",
)
@flag("--speed-shape", group=RUN, type=click.Choice(["1B", "source"]),
       text="Model for --speed: random weights of this size, or SOURCE itself.  [default: the recipe's, else 1B]")  # fmt: skip
@tokenizer_option(RUN)
@flag(
    "--dry-run",
    group=RUN,
    is_flag=True,
    text="List the cells with an estimate of their cost; only file headers are read.",
)
@output_options
def command(
    source: str,
    recipe: str,
    overrides: tuple[str, ...],
    calibration: tuple[str, ...],
    evaluation: tuple[str, ...],
    out: str,
    only: tuple[str, ...],
    device: str | None,
    export: str | None,
    speed: str | None,
    speed_shape: str | None,
    tokenizer: str | None,
    dry_run: bool,
    output: Output,
) -> None:
    """Parse, then list or measure, then print."""
    given = {
        "calibration": list(calibration) or None,
        "evaluation": list(evaluation) or None,
        "device": device,
        "export": export,
        "speed": None if speed is None else [name.strip() for name in speed.split(",")],
        "speed_shape": speed_shape,
    }
    complete = _recipe(recipe, given, overrides)
    if dry_run:
        from llamamoe.studies.compare import plan_comparison

        plan = plan_comparison(source, complete, out=out, only=only, tokenizer=tokenizer)
        output.result({"dry_run": True, **plan.to_json()}, lambda: _print_plan(plan, out))
        return
    comparison = _compare(source, out, complete, output, only=only, tokenizer=tokenizer)
    output.result(comparison.to_json(), lambda: _print(comparison, out, verbose=output.verbose))
    if comparison.failed:
        raise LlamaMoeError(
            f"{plural(len(comparison.failed), 'cell')} could not be done: {comparison.failed[0][0]}: {comparison.failed[0][1]}",
            hint="The others are finished; the same command tries again.",
        )


def _recipe(recipe: str, given: dict[str, Any], overrides: tuple[str, ...]) -> CompareRecipe:
    from llamamoe.studies.recipe import load_compare_recipe

    with recipe_file(recipe, "compare") as path:
        assert path is not None
        return load_compare_recipe(path, given=given, overrides=overrides)


def _compare(source: str, out: str, recipe: CompareRecipe, output: Output, **keys: Any) -> Comparison:
    from llamamoe import compare

    left = Path(out).expanduser()
    remark = f"finished cells are kept in {left}, the same command continues"
    with saying_what_is_left(left, remark), output.progress() as report:
        return compare(source, out, recipe, progress=report, **keys)


def _print_plan(plan: ComparisonPlan, out: str) -> None:
    echo(bold(f"{plan.source}: {plural(len(plan.cells), 'cell')}"))
    titles = ("cell (method/budget/seed)", "", "active share", "experts", "FLOPs", "time", "")
    rows = [
        (
            cell.label,
            "simulated" if cell.simulated else cell.kind,
            f"{100 * cell.share:.1f} %",
            _experts(cell),
            amount(cell.flops),
            duration(cell.seconds),
            "finished" if cell.finished else "",
        )
        for cell in plan.cells
    ]
    table(titles, rows, right=(2, 4, 5), wrap=(0,))
    if plan.speeds:
        heading(f"Speeds to measure, about 40 seconds each: {len(plan.speeds)}")
        bullets(plan.speeds)
    if plan.warnings:
        heading("Warnings")
        bullets(plan.warnings, mark="!")
    done = sum(cell.finished for cell in plan.cells)
    basis = "speed of the finished cells" if plan.rate_measured else "speed of two laptop cores"
    echo()
    paragraph(
        f"{done} finished in {out}, about {duration(plan.seconds_left)} left (estimated from the {basis}). Nothing was written."
    )
    paragraph(
        "Sizes follow from the budget. To compare a shape of your own, give the sizes to a method, in a copy of the recipe or by:"
    )
    echo(f"  {OWN_SHAPE}")


def _experts(cell: PlannedCell) -> str:
    from llamamoe.studies.table import shape

    return shape(cell.sizes)


def _print(comparison: Comparison, out: str, *, verbose: bool) -> None:
    from llamamoe.studies.table import simulations

    echo(bold(f"{comparison.source}: perplexity, mean over domains and seeds"))
    titles = ("method", "active share", "experts", "perplexity", "x dense", "recall@k", "seeds", "time")
    table(titles, [_row(row) for row in comparison.rows], right=(1, 3, 4, 5, 6, 7), wrap=(0,))
    _print_speed(comparison)
    if verbose:
        _details(comparison)
    if comparison.pending or comparison.failed:
        heading("Not done")
        bullets([*comparison.pending, *(f"{label}: {reason}" for label, reason in comparison.failed)])
    if comparison.warnings:
        heading("Warnings")
        bullets(comparison.warnings, mark="!")
    echo()
    for sentence in simulations(comparison.rows):
        paragraph(sentence)
    paragraph(f"In {Path(out)}: {', '.join(comparison.files.values())}.")


def _print_speed(comparison: Comparison) -> None:
    """Speeds over the dense model's, if they were measured."""
    from llamamoe.studies.table import number, over_dense, shape, speed_protocol, speed_tasks

    for program in dict.fromkeys(program for program, _ in speed_tasks(comparison.rows)):
        tasks = [task for each, task in speed_tasks(comparison.rows) if each == program]
        heading(f"Speed in {program}, over the dense model's")
        rows = [
            (
                row.method,
                shape(row.sizes),
                "" if row.ratio is None else number(row.ratio),
                *(over_dense(row.speed[program].get(task)) for task in tasks),
            )
            for row in comparison.rows
            if program in row.speed
        ]
        table(("method", "experts", "perplexity, x dense", *tasks), rows, right=range(2, 3 + len(tasks)), wrap=(0,))
    for sentence in speed_protocol(comparison.speeds):
        paragraph(sentence)


def _row(row: Row) -> tuple[str, ...]:
    from llamamoe.studies.table import shape, with_spread

    return (
        f"{row.method} (simulated)" if row.simulated else row.method,
        f"{100 * row.share:.1f} %",
        shape(row.sizes),
        with_spread(row.perplexity, row.perplexity_stdev),
        "" if row.ratio is None else with_spread(row.ratio, row.ratio_stdev),
        "" if row.recall_at_k is None else f"{row.recall_at_k:.2f}",
        str(len(row.seeds)) if row.seeds else "",
        duration(row.seconds),
    )


def _details(comparison: Comparison) -> None:
    """Print the details of ``-v``: domains, parameters, memory, and the protocol."""
    from llamamoe.studies.table import number

    domains = list(dict.fromkeys(name for row in comparison.rows for name in row.domains))
    if len(domains) > 1:
        heading("Perplexity by domain")
        rows = [
            (f"{row.method}{f' at {row.budget:g}' if row.budget else ''}", *(number(row.domains[d]) for d in domains))
            for row in comparison.rows
        ]
        table(("method", *domains), rows, right=range(1, len(domains) + 1), wrap=(0,))
    heading("Parameters, memory and what a layer lost")
    titles = ("method", "active", "total", "peak memory", "FFN error", "captured", "written / here")
    details = [
        (
            f"{row.method}{f' at {row.budget:g}' if row.budget else ''}",
            amount(row.active_parameters),
            amount(row.total_parameters),
            size(row.peak_bytes),
            "" if row.output_error is None else f"{row.output_error:.3f}",
            "" if row.captured is None else f"{row.captured:.3f}",
            "" if row.exported_ratio is None else f"x {row.exported_ratio:.4f}",
        )
        for row in comparison.rows
    ]
    table(titles, details, right=range(1, 7), wrap=(0,))
    heading("How it was measured")
    paragraph(comparison.protocol)
