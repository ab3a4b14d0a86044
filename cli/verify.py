"""``llamamoe verify``: does a converted checkpoint compute what its parent computes?"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from ._format import error, plural
from ._output import Output, output_options
from ._style import Command, Option
from ._tables import facts, heading, paragraph, table
from ._text import bold, echo, styled

if TYPE_CHECKING:
    from llamamoe.conversion.verify import Verification

HELP = """Check the folder OUT, written by `llamamoe split`, against the dense checkpoint that it was converted from.

Tensor names, shapes and configuration must match the recipe in OUT. Attention, norms and embeddings must be the parent's,
and each of its neurons must be found exactly once, bit for bit. All weights must have the SHA-256 in the receipt, and with
all experts selected the logits must agree with those of the parent in transformers. One layer is in memory at a time.
The exit code is 4 if anything does not match.
"""
EXAMPLES = """
llamamoe verify OUT --against SOURCE
llamamoe verify OUT --against org/name --json
"""


@click.command(cls=Command, section="Inspect and verify", rank=1, short_help="Check a conversion against its dense parent.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("out")
@click.option("--against", cls=Option, group="Comparison", metavar="SOURCE", required=True,
              help="The dense parent: a folder, a .gguf file or a Hub id.")  # fmt: skip
@output_options
def command(out: str, against: str, output: Output) -> None:
    """Parse, verify, print."""
    from llamamoe import verify

    with output.progress() as report:
        verification = verify(out, against, progress=report)
    output.result(
        verification.to_json(), lambda: _print(out, against, verification, verbose=output.verbose), summary=True
    )


def _neurons(verification: Verification) -> str:
    """Return the outcome of the comparison of neurons."""
    layers = plural(verification.neurons_checked, "layer")
    if verification.kept == "gate_up":
        return f"gate and up rows are the parent's, bit for bit, in {layers}; down projections were repaired"
    if verification.equal_weights is None:
        return f"all are the parent's, bit for bit, in {layers}"
    return f"every one found once (as often as there are copies), bit for bit, in {layers}"


def _weights(verification: Verification) -> str:
    """Return what was compared of all other tensors, and what could not be."""
    copied = f"{plural(verification.copied_checked, 'tensor')} outside the experts are the parent's, bit for bit"
    if verification.unproven:
        return f"{copied}; experts and routers could not be compared with what was written: {verification.unproven}"
    return f"{copied}; all {verification.hashed_checked} have the SHA-256 in the receipt"


def _distances(verification: Verification) -> list[tuple[str, str]]:
    """Return the relative differences of logits where no exactness is claimed."""
    values = (("as configured", verification.as_configured), ("with all experts", verification.all_experts))
    return [(name, f"logits differ by {value:.2g} of the largest") for name, value in values if value is not None]


def _print(out: str, against: str, verification: Verification, *, verbose: bool) -> None:
    echo(bold(out), ": ", styled("verified", fg="green"))
    rows = []
    for name, value, allowed in (
        ("all experts, equal weights", verification.equal_weights, verification.equal_tolerance),
        ("all experts, router as stored", verification.as_stored, verification.stored_tolerance),
    ):
        if value is not None:
            rows.append((name, error(value), error(allowed)))
    if rows:
        table(("largest difference of a logit", "relative", "allowed"), rows, right=(1, 2))
    else:
        paragraph(
            "Files, names and shapes are as the recipe says, and all values are finite. Weights were refitted or neurons left out, so "
            "outputs are meant to differ from the parent's: the distances below are intended. The perplexity says what was lost:"
        )
        echo(f"  llamamoe evaluate {shlex.quote(out)} --against {shlex.quote(against)} --text HELD_OUT_TEXT")
    facts(
        [
            *([("neurons", _neurons(verification))] if verification.neurons_checked else []),
            ("weights", _weights(verification)),
            *_distances(verification),
            ("text", f"{plural(verification.num_tokens, 'token')} of {verification.tokens}"),
            ("reference", verification.reference),
        ]
    )
    if verbose:
        heading("FFN outputs by layer")
        table(("layer", "difference"), [(str(i), error(e)) for i, e in verification.layer_error], right=(0, 1))
