"""``llamamoe heal``: layers distilled from the dense parent's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from ._format import amount, duration, plural, size, took
from ._output import Output, kept_when_interrupted, output_options
from ._recipe_options import recipe_file
from ._style import COUNT, Command, flag, run_options
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.healing.heal import HealResult
    from llamamoe.healing.plan import HealPlan
    from llamamoe.healing.recipe import HealRecipe

HELP = """Distil the layers of the converted checkpoint MODEL from those of its dense parent, and write the result to the folder OUT.

Each converted FFN and its router are trained to reproduce the output of the parent's FFN on the same inputs. There is no
backward pass through the model: layers are independent, so under torchrun each process trains some of them. A layer that
does not improve on held-out tokens is left unchanged.

Files are written to OUT.partial, which is renamed to OUT when it is complete.
"""
EXAMPLES = """
llamamoe heal MODEL OUT --parent DENSE --text texts/ --dry-run
llamamoe heal MODEL OUT --parent DENSE --text texts/ --tokens 1000000
llamamoe heal MODEL OUT --parent DENSE --text texts/ --set router=trained --set epochs=16
llamamoe heal MODEL OUT --parent DENSE --text texts/ --resume
torchrun --nproc-per-node 8 -m llamamoe_cli heal MODEL OUT --parent DENSE --text texts/
"""
RECIPE, RUN = "Recipe", "Run"


@click.command(cls=Command, section="Train", rank=1, short_help="Distil each layer from the dense parent.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out", required=False)
@flag("--parent", group=RUN, metavar="DENSE", required=True, text="The dense checkpoint that MODEL was made from.")
@flag("--text", group=RECIPE, metavar="PATH", multiple=True,
       text="Text to distil on, instead of the recipe's: a file, folder or glob; may be repeated.")  # fmt: skip
@flag(
    "--recipe", group=RECIPE, metavar="FILE|NAME", text="A YAML file, or the name of a recipe that ships with llamamoe."
)
@flag("--set", "overrides", group=RECIPE, metavar="KEY=VALUE", multiple=True,
       text="Set one key of the recipe, such as epochs=16; may be repeated.")  # fmt: skip
@flag(
    "--tokens",
    group=RECIPE,
    metavar="N",
    type=COUNT,
    text="Maximum number of training tokens.  [default: the recipe's, else 262144]",
)
@flag(
    "--device",
    group=RECIPE,
    metavar="NAME",
    text="A torch device, such as cpu or cuda:0.  [default: the GPU if there is one]",
)
@flag("--compute-dtype", group=RECIPE, type=click.Choice(["float32", "bfloat16"]),
       text="Dtype of large matrix products.  [default: bfloat16 for 16-bit weights where it is much faster, else float32]")  # fmt: skip
@flag("--dry-run", group=RUN, is_flag=True, text="Print the plan and write nothing; only file headers are read.")
@run_options(RUN, resume="Resume an interrupted run of the same command.",
              force="Replace an existing healed checkpoint in OUT and discard the files of an interrupted run.")  # fmt: skip
@output_options
def command(
    model: str,
    out: str | None,
    parent: str,
    text: tuple[str, ...],
    recipe: str | None,
    overrides: tuple[str, ...],
    tokens: int | None,
    device: str | None,
    compute_dtype: str | None,
    dry_run: bool,
    resume: bool,
    force: bool,
    output: Output,
) -> None:
    """Parse, then plan or heal, then print."""
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT': the folder to write.")
    given = {"text": list(text) or None, "tokens": tokens, "device": device, "compute_dtype": compute_dtype}
    complete = _recipe(recipe, given, overrides)
    if dry_run:
        _plan(model, out, parent, complete, resume, force, output)
        return
    follows = int(os.environ.get("RANK", "0")) > 0  # torchrun: the first process speaks for all
    output = Output(quiet=True) if follows else output
    result = _heal(model, str(out), complete, output, parent=parent, resume=resume, force=force)
    if follows:
        return
    if output.quiet:
        bullets(result.warnings, mark="!", err=True)
    output.result({"out": str(result.out), **result.receipt}, lambda: _print(result), summary=True)


def _recipe(recipe: str | None, given: dict[str, Any], overrides: tuple[str, ...]) -> HealRecipe:
    from llamamoe.healing.recipe import load_heal_recipe

    with recipe_file(recipe, "heal") as path:
        return load_heal_recipe(path, given=given, overrides=overrides)


def _plan(
    model: str, out: str | None, parent: str, recipe: HealRecipe, resume: bool, force: bool, output: Output
) -> None:
    from llamamoe.checkpoint.out_folder import normal_path
    from llamamoe.healing.output import check_place
    from llamamoe.healing.plan import plan_heal

    plan = plan_heal(model, parent, recipe)
    if out is not None:
        check_place(normal_path(out), plan, resume=resume, force=force)
    output.result({"dry_run": True, "out": out, **plan.to_json()}, lambda: _print_plan(plan))


def _heal(model: str, out: str, recipe: HealRecipe, output: Output, **keys: Any) -> HealResult:
    from llamamoe.healing.heal import heal

    with kept_when_interrupted(out), output.progress() as report:
        return heal(model, out, recipe, progress=report, **keys)


def _print_plan(plan: HealPlan) -> None:
    recipe = plan.recipe
    echo(bold(f"{plan.model.name}: heal {plural(len(plan.layers), 'layer')}"))
    facts([
        ("parent", plan.parent.name),
        ("experts", f"{plan.num_experts} in each layer, {plan.top_k} selected per token; {plan.target.name}"),
        ("routers", recipe.router),
        ("text", f"{recipe.tokens:,} tokens at most, {plan.held_out_tokens:,} of them held out; sequences of {plan.length}"),
        ("training", f"{plural(plan.steps, 'step')} a layer, {amount(plan.trained_parameters)} parameters of each"),
        ("memory", f"{size(plan.peak_bytes)} at most"),
        ("disk", size(plan.nbytes) + (f", {size(2 * plan.state_bytes)} meanwhile for each process" if plan.states_in_files else "")),
        ("time", f"about {duration(plan.seconds)} on two laptop cores in float32"),
    ])  # fmt: skip
    if plan.warnings:
        heading("Warnings")
        bullets(plan.warnings, mark="!")
    echo("\nNothing was written.")


def _print(result: HealResult) -> None:
    receipt = result.receipt
    echo(bold(f"{result.out}: {plural(len(receipt['layers']), 'layer')} healed"))
    rows = [
        (
            str(layer["layer"]),
            _error(layer["error_before"]),
            _error(layer["error_after"]),
            "" if layer["kept"] else "not improved, left unchanged",
        )
        for layer in receipt["layers"]
    ]
    table(("layer", "error before", "after", ""), rows, right=(0, 1, 2))
    echo()
    paragraph(
        f"Errors are relative to the parent's outputs, on {receipt['tokens']['held_out']:,} held-out tokens. Took "
        f"{took(receipt['run'])}."
    )
    if result.warnings:
        heading("Warnings")
        bullets(result.warnings, mark="!")


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
