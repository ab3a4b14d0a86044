"""``llamamoe resplit``: smaller experts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from ._format import routed_factor, size
from ._outcome import layer_errors
from ._output import Output, kept_when_interrupted, output_options
from ._plan import calibration_rows, peak_memory
from ._recipe_options import CALIBRATION, Row, recipe_file, recipe_options, row_of
from ._style import Command, check_resume_or_force, flag, run_options
from ._tables import bullets, facts
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.resplitting.plan import ResplitResult
    from llamamoe.transforms.resplitting.recipe import ResplitRecipe

HELP = """Split every expert of the mixture MODEL into smaller experts, and write the result to the folder OUT.

MODEL is a converted checkpoint or another mixture of a supported architecture, for example Mixtral or Qwen3-MoE. As many
times more experts are selected per token, so the result computes the function of MODEL; continued training can then
specialise the smaller experts.

With --top-k and --calibration text fewer are selected, so that a token costs less: router rows are fitted on the text, and
down projections refitted.

Flags override the values of the recipe, and --set overrides both.
"""
EXAMPLES = """
llamamoe resplit MODEL OUT --pieces 4
llamamoe resplit MODEL --pieces 4 --dry-run           # sizes only
llamamoe resplit MODEL OUT --pieces 4 --top-k 4 --calibration texts/
"""
SIZES, RUN = "Sizes", "Run"


def _methods() -> list[str]:
    from llamamoe.transforms.resplitting.recipe import usable_methods

    return usable_methods(text=True)


_ROWS = (
    Row("--pieces", "pieces", SIZES, "M", int),
    row_of("top_k", group=SIZES, unset="all of them",
           text="Smaller experts selected per token; fewer than all pieces of MODEL's selected experts need --calibration"),
    row_of("method", group=SIZES, names=_methods, unset="kmeans; with text token_clusters",
           text="How the neurons of an expert are partitioned: cluster_shared, kmeans or random; with --calibration also activation, "
           "coactivation, learned or token_clusters"),
    row_of("seed", group=SIZES),
    row_of("calibration", metavar="PATH",
           text="Calibration text: a file (txt, jsonl, parquet; also .gz, .zst), folder or glob; may be repeated"),
    *(row_of(f"calibration_{key}") for key in ("tokens", "weights", "length")),
    row_of("repair", group=CALIBRATION, unset=""),
    row_of("device"),
    row_of("compute_dtype", unset="bfloat16 for a 16-bit MODEL where it is much faster, else float32"),
    row_of("shard_size"),
)  # fmt: skip


def _model() -> type[ResplitRecipe]:
    from llamamoe.transforms.resplitting.recipe import ResplitRecipe

    return ResplitRecipe


@click.command(cls=Command, section="Convert", rank=1, short_help="Split the experts of a mixture into smaller ones.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out", required=False)
@flag("--recipe", group="Recipe", metavar="FILE|NAME",
      text="A YAML file, or the name of a recipe that ships with llamamoe.")  # fmt: skip
@flag("--set", "overrides", group="Recipe", metavar="KEY=VALUE", multiple=True,
      text="Set one key of the recipe, such as repair.ridge=0.01; may be repeated.")  # fmt: skip
@recipe_options(_ROWS, _model)
@flag("--dry-run", group=RUN, is_flag=True, text="Print the sizes of the result and write nothing.")
@run_options(RUN, force="Replace an existing checkpoint in OUT.")
@output_options
def command(
    model: str,
    out: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    resume: bool,
    force: bool,
    output: Output,
    **given: Any,
) -> None:
    """Parse, write, print."""
    check_resume_or_force(resume, force)
    if out is None and not dry_run:
        raise click.UsageError("OUT is missing: name a folder to create, or plan with --dry-run.")
    complete = _recipe(recipe, given, overrides)
    from llamamoe import resplit

    with nullcontext() if out is None or dry_run else kept_when_interrupted(out), output.progress() as report:
        found = resplit(model, out, recipe=complete, dry_run=dry_run, resume=resume, force=force, progress=report)
    output.result(
        {"dry_run": dry_run, **found.to_json()},
        lambda: _print(found, complete),
        summary=not dry_run,
        warnings=found.warnings,
    )


def _recipe(recipe: str | None, given: dict[str, Any], overrides: tuple[str, ...]) -> ResplitRecipe:
    from llamamoe.transforms.resplitting.recipe import load_resplit_recipe

    with recipe_file(recipe, "resplit") as path:
        return load_resplit_recipe(path, given=given, overrides=overrides)


def _print(found: ResplitResult, recipe: ResplitRecipe) -> None:
    (before, after), (few, many) = found.num_experts, found.top_k
    echo(bold(f"{found.out or 'plan'}: {many} of {after} experts per token instead of {few} of {before}"))
    rows = [
        ("expert", f"{found.expert_width[1]:,} neurons instead of {found.expert_width[0]:,}"),
        ("factor", routed_factor(found.factor, found.where)),
    ]
    if found.calibration is None:
        rows.append(("exact", "yes" if found.exact else "one rounding"))
    else:
        used, of = found.active_neurons[1], found.active_neurons[0]
        rows.append(("exact", f"no: a token uses {used:,} neurons of routed experts in a layer instead of {of:,}"))
        errors = layer_errors(found.receipt.get("layers", []), "the routed experts' output", "0 is MODEL")
        rows += errors or [
            *calibration_rows(found.calibration, recipe.calibration_tokens),
            ("peak memory", peak_memory(found.calibration.peak_bytes)),
        ]
    facts([*rows, ("files", size(found.nbytes))])
    bullets(found.warnings, mark="!")
