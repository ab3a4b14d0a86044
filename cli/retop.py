"""``llamamoe retop``: another number of selected experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import plural, routed_factor
from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option, check_resume_or_force, run_options
from ._tables import bullets, facts
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.retop import RetopResult

HELP = """Write a copy of the converted checkpoint MODEL, with another number of experts selected per token, to the folder OUT.

Editing config.json alone would change the scale of the FFN outputs, because most rescale rules depend on the number of
selected experts. The correcting factor is stored in the configuration if the architecture has a key for it, otherwise it
is multiplied into the experts' down projections.
"""
EXAMPLES = """
llamamoe retop MODEL OUT --top-k 4
"""
SIZES, RUN = "Sizes", "Run"


@click.command(cls=Command, section="Convert", rank=3, short_help="Change the number of experts selected per token.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out")
@click.option(
    "--top-k",
    key="k",
    cls=Option,
    group=SIZES,
    type=int,
    metavar="K",
    required=True,
    help="Experts selected per token.",
)
@click.option("--rescale", cls=Option, group=SIZES, metavar="NAME",
              help="Rescale rule used at conversion.  [default: the one named in config.json]")  # fmt: skip
@run_options(RUN, force="Replace an existing checkpoint in OUT.")
@output_options
def command(model: str, out: str, top_k: int, rescale: str | None, resume: bool, force: bool, output: Output) -> None:
    """Parse, write, print."""
    check_resume_or_force(resume, force)
    from llamamoe import retop

    with kept_when_interrupted(out), output.progress() as report:
        found = retop(model, out, top_k, rescale=rescale, resume=resume, force=force, progress=report)
    output.result(
        {"out": str(found.out), **found.receipt}, lambda: _print(found), summary=True, warnings=found.warnings
    )


def _print(found: RetopResult) -> None:
    echo(bold(f"{found.out}: {plural(found.top_k[1], 'expert')} per token instead of {found.top_k[0]}"))
    rounded = "nothing" if found.exact else "down projections, once"
    facts([("factor", routed_factor(found.factor, found.where)), ("rounded", rounded)])
    bullets(found.warnings, mark="!")
