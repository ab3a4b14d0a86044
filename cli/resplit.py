"""``llamamoe resplit``: smaller experts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from ._format import routed_factor, size
from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option, check_resume_or_force, run_options
from ._tables import bullets, facts
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.resplit import ResplitResult

HELP = """Split every expert of the mixture MODEL into smaller experts, and write the result to the folder OUT.

MODEL is a converted checkpoint or another mixture of a supported architecture, for example Mixtral or Qwen3-MoE. As many
times more experts are selected per token, so the result computes the function of MODEL; continued training can then
specialise the smaller experts.
"""
EXAMPLES = """
llamamoe resplit MODEL OUT --pieces 4
llamamoe resplit MODEL --pieces 4 --dry-run           # sizes only
"""
SIZES, RUN = "Sizes", "Run"


@click.command(cls=Command, section="Convert", rank=1, short_help="Split the experts of a mixture into smaller ones.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out", required=False)
@click.option("--pieces", cls=Option, group=SIZES, type=int, metavar="M", required=True,
              help="Number of smaller experts made of each expert.")  # fmt: skip
@click.option("--method", cls=Option, group=SIZES, metavar="NAME", default="kmeans", show_default=True,
              help="How the neurons of an expert are partitioned: kmeans or random.")  # fmt: skip
@click.option("--seed", cls=Option, group=SIZES, type=int, metavar="N", default=0, show_default=True,
              help="Seed of the partition.")  # fmt: skip
@click.option("--shard-size", cls=Option, group="Result", metavar="SIZE", default="5GB", show_default=True,
              help="Maximum size of one weights file, for example 5GB or 500MB.")  # fmt: skip
@click.option("--dry-run", cls=Option, group=RUN, is_flag=True, help="Print the sizes of the result and write nothing.")
@run_options(RUN, force="Replace an existing checkpoint in OUT.")
@output_options
def command(
    model: str,
    out: str | None,
    pieces: int,
    method: str,
    seed: int,
    shard_size: str,
    dry_run: bool,
    resume: bool,
    force: bool,
    output: Output,
) -> None:
    """Parse, write, print."""
    check_resume_or_force(resume, force)
    if out is None and not dry_run:
        raise click.UsageError("OUT is missing: name a folder to create, or plan with --dry-run.")
    from llamamoe import resplit

    keys = {"method": method, "seed": seed, "shard_size": shard_size, "dry_run": dry_run}
    with nullcontext() if out is None or dry_run else kept_when_interrupted(out), output.progress() as report:
        found = resplit(model, out, pieces, resume=resume, force=force, progress=report, **keys)  # type: ignore[arg-type]
    output.result(
        {"dry_run": dry_run, **found.to_json()}, lambda: _print(found), summary=not dry_run, warnings=found.warnings
    )


def _print(found: ResplitResult) -> None:
    (before, after), (few, many) = found.num_experts, found.top_k
    echo(bold(f"{found.out or 'plan'}: {many} of {after} experts per token instead of {few} of {before}"))
    facts(
        [
            ("expert", f"{found.expert_width[1]:,} neurons instead of {found.expert_width[0]:,}"),
            ("factor", routed_factor(found.factor, found.where)),
            ("exact", "yes" if found.exact else "one rounding"),
            ("files", size(found.nbytes)),
        ]
    )
    bullets(found.warnings, mark="!")
