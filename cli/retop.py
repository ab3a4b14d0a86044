"""``llamamoe retop``: another number of selected experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option
from ._tables import bullets, facts
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.retop import RetopResult

HELP = """Write the converted checkpoint MODEL again, with another number of experts selected per token, into the folder OUT.

A setting in config.json alone would change the size of the FFNs' outputs wherever the conversion's rescale depends on the
number of selected experts. What it must be multiplied by goes into the configuration where the architecture has a place
for it, else into the experts' down projections.
"""
EXAMPLES = """
llamamoe retop MODEL OUT --top-k 4
"""
SIZES, RUN = "Sizes", "This run"


@click.command(cls=Command, section="Convert", rank=3, short_help="Select another number of experts.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out")
@click.option("--top-k", cls=Option, group=SIZES, type=int, metavar="K", required=True, help="Experts per token.")
@click.option("--rescale", cls=Option, group=SIZES, metavar="NAME",
              help="Rescale rule used at conversion.  [default: as its config.json says]")  # fmt: skip
@click.option("--resume", cls=Option, group=RUN, is_flag=True, help="Finish what an interrupted run left.")
@click.option("--force", cls=Option, group=RUN, is_flag=True, help="Replace the checkpoint in OUT.")
@output_options
def command(model: str, out: str, top_k: int, rescale: str | None, resume: bool, force: bool, output: Output) -> None:
    """Parse, write, print."""
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other.")
    from llamamoe import retop

    with kept_when_interrupted(out), output.progress() as report:
        found = retop(model, out, top_k, rescale=rescale, resume=resume, force=force, progress=report)
    output.result(
        {"out": str(found.out), **found.receipt}, lambda: _print(found), summary=True, warnings=found.warnings
    )


def _print(found: RetopResult) -> None:
    echo(bold(f"{found.out}: {found.top_k[1]} experts per token in the place of {found.top_k[0]}"))
    places = {"nowhere": "nothing had to change", "config": "in routed_scaling_factor", "weights": "in the experts"}
    facts(
        [("factor", f"{found.factor:.6g}, {places[found.where]}"), ("exact", "yes" if found.exact else "one rounding")]
    )
    bullets(found.warnings, mark="!")
