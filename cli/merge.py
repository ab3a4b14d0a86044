"""``llamamoe merge``: the weighted average of checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option, check_resume_or_force, run_options
from ._tables import bullets, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.merge import MergeResult

HELP = """Average the weights of checkpoints of the same architecture and size, and write the result to the folder --out.

Averaging a trained model with the checkpoint that it was trained from often keeps more of both (LM-Cocktail,
arXiv:2311.13534), and so does averaging runs with different seeds. With --weights auto, each model is weighed by how well
it predicts a few examples: softmax(-loss / temperature). Tensors are read and written one at a time. Other
files, dtype and tokenizer are taken from the first model.
"""
EXAMPLES = """
llamamoe merge run/model MODEL --weights 0.7,0.3 --out merged
llamamoe merge run/model MODEL --weights auto --examples task.jsonl --out merged
llamamoe merge seed0/model seed1/model seed2/model --out soup
"""
RUN = "Run"


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | str | None:
    try:
        return value if value in (None, "auto") else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a list of numbers such as 0.7,0.3 nor auto.") from None


@click.command(cls=Command, section="Convert", rank=4, short_help="Average the weights of checkpoints.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("models", metavar="MODEL MODEL...", nargs=-1, required=True)
@click.option("--weights", cls=Option, group="Average", metavar="W,W|auto", callback=_numbers,
              help="One weight per model; they are normalised to sum to 1. auto: by the losses on --examples.  "
              "[default: equal]")  # fmt: skip
@click.option("--examples", cls=Option, group="Average", metavar="PATH", multiple=True,
              help="Text for --weights auto, such as a few documents of a task: a file (txt, jsonl, parquet; also .gz, .zst), folder or "
              "glob; may be repeated.")  # fmt: skip
@click.option("--temperature", cls=Option, group="Average", type=float, metavar="T",
              help="Temperature of --weights auto; the smaller, the more the best model counts.  [default: 5]")  # fmt: skip
@click.option("--out", cls=Option, group=RUN, metavar="DIR", required=True, help="The folder to write.")
@run_options(RUN, force="Replace an existing checkpoint in OUT.")
@output_options
def command(
    models: tuple[str, ...],
    weights: Any,
    examples: tuple[str, ...],
    temperature: float | None,
    out: str,
    resume: bool,
    force: bool,
    output: Output,
) -> None:
    """Parse, average, print."""
    check_resume_or_force(resume, force)
    from llamamoe import merge

    with kept_when_interrupted(out), output.progress() as report:
        given = {} if temperature is None else {"temperature": temperature}
        found = merge(
            models, out, weights=weights, examples=examples, **given, resume=resume, force=force, progress=report
        )
    losses = {} if found.losses is None else {"losses": list(found.losses)}
    output.result(
        {"out": str(found.out), **losses, **found.receipt},
        lambda: _print(models, found),
        summary=True,
        warnings=found.warnings,
    )


def _print(models: tuple[str, ...], found: MergeResult) -> None:
    echo(bold(f"{found.out}: the average of {len(models)} models"))
    rows = [(model, f"{weight:.4g}") for model, weight in zip(models, found.weights, strict=True)]
    if found.losses is None:
        table(("model", "weight"), rows, right=(1,))
    else:
        told = [(*row, f"{loss:.4f}") for row, loss in zip(rows, found.losses, strict=True)]
        table(("model", "weight", "loss on the examples"), told, right=(1, 2))
    bullets(found.warnings, mark="!")
