"""``llamamoe densify``: back to a dense checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option, check_resume_or_force, run_options
from ._tables import bullets, facts
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.densify import DensifyResult

HELP = """Join the experts of the converted checkpoint MODEL into one dense FFN per layer again, and write it to the folder OUT.

All neurons run for every token and the router is removed. Experts of attention are joined to its query heads. For an
exact conversion the result is the parent, bit for bit if its rescale factor was a power of two. For a repaired or trained
model the result is a dense model with those weights: measure it before you use it.
"""
EXAMPLES = """
llamamoe densify MODEL OUT
llamamoe densify MODEL OUT --like PARENT              # neurons in the parent's order
"""
RUN = "Run"


@click.command(cls=Command, section="Convert", rank=5, short_help="Convert back to a dense checkpoint.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out")
@click.option(
    "--like", cls=Option, group="Result", metavar="PARENT", help="Order the neurons as in this dense checkpoint."
)
@click.option("--rescale", cls=Option, group="Result", metavar="NAME",
              help="Rescale rule used at conversion.  [default: the one named in config.json]")  # fmt: skip
@click.option("--shard-size", cls=Option, group="Result", metavar="SIZE", default="5GB", show_default=True,
              help="Maximum size of one weights file, for example 5GB or 500MB.")  # fmt: skip
@run_options(RUN, force="Replace an existing checkpoint in OUT.")
@output_options
def command(
    model: str,
    out: str,
    like: str | None,
    rescale: str | None,
    shard_size: str,
    resume: bool,
    force: bool,
    output: Output,
) -> None:
    """Parse, write, print."""
    check_resume_or_force(resume, force)
    from llamamoe import densify

    keys = {"like": like, "rescale": rescale, "shard_size": shard_size}
    with kept_when_interrupted(out), output.progress() as report:
        found = densify(model, out, resume=resume, force=force, progress=report, **keys)  # type: ignore[arg-type]
    output.result(
        {"out": str(found.out), **found.receipt}, lambda: _print(found), summary=True, warnings=found.warnings
    )


def _print(found: DensifyResult) -> None:
    echo(bold(f"{found.out}: a dense model with {found.intermediate_size:,} neurons per layer"))
    kept = "those of MODEL, without rounding" if found.exact else "those of MODEL, rounded once or changed by training"
    facts([("weights", kept)])
    bullets(found.warnings, mark="!")
