"""``llamamoe merge``: the weighted average of checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option, check_resume_or_force, run_options
from ._tables import bullets, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.merge import MergeResult

HELP = """Average the weights of checkpoints of the same architecture and size, and write the result to the folder --out.

Averaging a trained model with the checkpoint that it was trained from often keeps more of both (LM-Cocktail,
arXiv:2311.13534), and so does averaging runs with different seeds. Tensors are read and written one at a time. Other
files, dtype and tokenizer are taken from the first model.
"""
EXAMPLES = """
llamamoe merge run/model MODEL --weights 0.7,0.3 --out merged
llamamoe merge seed0/model seed1/model seed2/model --out soup
"""
RUN = "Run"


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.7,0.3.") from None


@click.command(cls=Command, section="Convert", rank=4, short_help="Average the weights of checkpoints.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("models", metavar="MODEL MODEL...", nargs=-1, required=True)
@click.option("--weights", cls=Option, group="Average", metavar="W,W", callback=_numbers,
              help="One weight per model; they are normalised to sum to 1.  [default: equal]")  # fmt: skip
@click.option("--out", cls=Option, group=RUN, metavar="DIR", required=True, help="The folder to write.")
@run_options(RUN, force="Replace an existing checkpoint in OUT.")
@output_options
def command(
    models: tuple[str, ...], weights: list[float] | None, out: str, resume: bool, force: bool, output: Output
) -> None:
    """Parse, average, print."""
    check_resume_or_force(resume, force)
    from llamamoe import merge

    with kept_when_interrupted(out), output.progress() as report:
        found = merge(models, out, weights=weights, resume=resume, force=force, progress=report)
    output.result(
        {"out": str(found.out), **found.receipt}, lambda: _print(models, found), summary=True, warnings=found.warnings
    )


def _print(models: tuple[str, ...], found: MergeResult) -> None:
    echo(bold(f"{found.out}: the average of {len(models)} models"))
    table(("model", "weight"), [(m, f"{w:.4g}") for m, w in zip(models, found.weights, strict=True)], right=(1,))
    bullets(found.warnings, mark="!")
