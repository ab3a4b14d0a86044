"""``llamamoe export-tokens``: tokens for another training program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import amount, plural
from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option, check_resume_or_force, partial_options
from ._tables import table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.data.export_tokens import TokensExport

HELP = """Write the tokens in TOKENS as indexed datasets in OUT, for training with Megatron-LM or Megatron-Bridge.

TOKENS is a folder from `llamamoe tokenize`. OUT gets SPLIT/DOMAIN.bin and .idx per split and domain; the tokens are the
same, and every document ends at its end-of-sequence token. The arguments of Megatron's --data-path are printed, with
the number of tokens as the weight of a domain.

Files are written to OUT.partial, which is renamed to OUT when it is complete. After an interruption, the same command
with --resume continues.
"""
EXAMPLES = """
llamamoe export-tokens tokens megatron-tokens
llamamoe export-tokens tokens megatron-tokens --json
"""


@click.command(cls=Command, section="Train", rank=4, short_help="Write tokens for Megatron.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("tokens")
@click.argument("out")
@click.option("--format", "kind", cls=Option, group="Result", metavar="NAME", default="megatron", show_default=True,
              help="The program that reads them: megatron.")  # fmt: skip
@partial_options("Run")
@output_options
def command(tokens: str, out: str, kind: str, resume: bool, force: bool, output: Output) -> None:
    """Parse, write, print."""
    from llamamoe import export_tokens

    check_resume_or_force(resume, force)
    with kept_when_interrupted(out), output.progress() as report:
        found = export_tokens(tokens, out, format=kind, resume=resume, force=force, progress=report)
    output.result(found.to_json(), lambda: _print(found), summary=True, warnings=found.warnings)


def _print(found: TokensExport) -> None:
    echo(bold(f"{found.out}: {plural(len(found.domains), 'dataset')}, {found.dtype}"))
    rows = [(f"{each.prefix}.bin", amount(each.tokens), amount(each.documents)) for each in found.domains]
    table(("dataset", "tokens", "documents"), rows, right=(1, 2), wrap=(0,))
    for split in dict.fromkeys(each.split for each in found.domains):
        echo(f"{split}: --data-path {' '.join(found.data_path(split))}")
