"""``llamamoe report``: one page that shows what a conversion lost, how it routes and what it costs."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from ._output import Output, output_options
from ._style import COUNT, Command, flag, model_options, tokenizer_option
from ._tables import bullets, table
from ._text import echo

HELP = """Write an HTML report on the quality, routing and cost of converted models.

Each MODEL, and the dense parent given by --against, is measured on the text, domain by domain. The report says what was
lost and gained, and what to do next; a statically pruned model beside the converted one shows whether its router is worth its
cost. It is one file that needs no network. The same numbers are available as JSON.
"""
EXAMPLES = """
llamamoe report OUT --against SOURCE --text held-out/ --out page.html
llamamoe report OUT PRUNED --against SOURCE --text held-out/
llamamoe report moe run/model --against SOURCE --text valid/ --json-out report.json
"""
TEXT, HOW, RUN = "Text", "Execution", "Run"


@click.command(cls=Command, section="Measure", rank=3, short_help="Write an HTML report on quality, routing and cost.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@flag("--against", group=RUN, metavar="PARENT", text="The dense parent, measured as well.")
@flag("--text", group=TEXT, metavar="PATH", multiple=True, required=True,
       text="Text to measure on: a file, folder or glob (txt, jsonl, parquet; also .gz, .zst); may be repeated.")  # fmt: skip
@flag("--max-tokens", group=TEXT, type=COUNT, metavar="N", default=8192, show_default=True,
       text="Maximum number of tokens per domain; 0 for all.")  # fmt: skip
@flag("--context-length", group=TEXT, type=COUNT, metavar="N",
       text="Number of tokens per window.  [default: the model's context length, at most 2048]")  # fmt: skip
@flag("--oracle-tokens", group=TEXT, type=COUNT, metavar="N", default=1024, show_default=True,
       text="Number of tokens per domain on which routers are compared with an oracle.")  # fmt: skip
@flag("--run", "runs", group=RUN, metavar="DIR", multiple=True,
       text="Folder of a `llamamoe pretrain` run whose curves are shown; the run that contains MODEL is found automatically.")  # fmt: skip
@flag(
    "--out", group=RUN, metavar="FILE", text="The report to write.  [default: report.html, unless --json-out is given]"
)
@flag("--json-out", group=RUN, metavar="FILE", text="Write the same numbers as JSON to this file.")
@flag("--force", group=RUN, is_flag=True, text="Replace existing files.")
@tokenizer_option(HOW)
@model_options(HOW)
@output_options
def command(
    models: tuple[str, ...],
    against: str | None,
    text: tuple[str, ...],
    max_tokens: int,
    context_length: int | None,
    oracle_tokens: int,
    runs: tuple[str, ...],
    out: str | None,
    json_out: str | None,
    force: bool,
    tokenizer: str | None,
    dtype: str,
    device: str,
    output: Output,
) -> None:
    """Parse, measure, print where the page is."""
    from llamamoe import report

    out = "report.html" if out is None and json_out is None else out
    with output.progress() as progress:
        found = report(
            models,
            text,
            against=against,
            tokenizer=tokenizer,
            out=out,
            json_out=json_out,
            runs=runs,
            max_tokens=max_tokens or None,
            context_length=context_length,
            oracle_tokens=oracle_tokens,
            dtype=dtype,
            device=device,
            command=shlex.join(["llamamoe", *sys.argv[1:]]),
            force=force,
            progress=progress,
        )
    output.result(found, lambda: _print(found, out, json_out), summary=True)


def _print(found: dict[str, Any], out: str | None, json_out: str | None) -> None:
    key = "perplexity" if all(each["comparable"] == "perplexity" for each in found["models"]) else "bits_per_byte"
    sides = [*([found["parent"]] if found["parent"] else []), *found["models"]]
    rows = [
        (
            each["name"],
            f"{each['scores']['mean_over_domains'][key]:.4g}",
            f"{each['cost']['active_parameters'] / 1e6:,.1f} M of {each['cost']['total_parameters'] / 1e6:,.1f} M",
        )
        for each in sides
    ]
    table(("model", key.replace("_", " "), "active parameters"), rows, right=(1,))
    bullets(found["notes"], mark="!")
    echo(f"\n{' and '.join(name for name in (out, json_out) if name)} written.")
