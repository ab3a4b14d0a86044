"""``llamamoe evaluate``: perplexity and bits per byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import plural
from ._output import Output, output_options
from ._style import Command, Option
from ._tables import heading, paragraph, table

if TYPE_CHECKING:
    from llamamoe.scores import Difference, Evaluation, ModelScores, Score

HELP = """Measure how well MODEL predicts a text: perplexity and bits per byte, by domain and over all.

MODEL is any causal language model that transformers loads: a folder or a hub id. With --against a second model is
measured on the same text and the difference is given with its standard error.
"""
EXAMPLES = """
llamamoe evaluate OUT --text wiki.txt --text code/ --max-tokens 100000
llamamoe evaluate OUT --text corpus.jsonl --against SOURCE --json
"""
TEXT, RUN = "Text", "How it runs"


@click.command(cls=Command, section="Measure", rank=0, short_help="Perplexity and bits per byte, by domain.", help=HELP,
               examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.option("--text", cls=Option, group=TEXT, metavar="PATH", multiple=True, required=True,
              help="A file, folder or glob (text, JSON lines, Parquet); may be repeated.")  # fmt: skip
@click.option("--max-tokens", cls=Option, group=TEXT, type=int, metavar="N",
              help="Take only so many tokens of each domain.  [default: all]")  # fmt: skip
@click.option("--context-length", cls=Option, group=TEXT, type=int, metavar="N",
              help="Tokens of a window.  [default: the model's positions, at most 2048]")  # fmt: skip
@click.option("--against", cls=Option, group=RUN, metavar="OTHER", help="Measure this model too, and the difference.")
@click.option("--batch-size", cls=Option, group=RUN, type=int, default=8, show_default=True, metavar="N",
              help="Windows that run together.")  # fmt: skip
@click.option("--dtype", cls=Option, group=RUN, default="auto", metavar="NAME",
              help="auto, float32, bfloat16 or float16.  [default: auto, as stored]")  # fmt: skip
@click.option("--device", cls=Option, group=RUN, default="auto", metavar="NAME",
              help="A torch device.  [default: auto, the GPU if there is one]")  # fmt: skip
@output_options
def command(
    model: str, text: tuple[str, ...], max_tokens: int | None, context_length: int | None, against: str | None,
    batch_size: int, dtype: str, device: str, output: Output,
) -> None:  # fmt: skip
    """Parse, evaluate, print."""
    from llamamoe.evaluation import evaluate

    with output.progress() as report:
        found = evaluate(
            model,
            text,
            against=against,
            max_tokens=max_tokens,
            context_length=context_length,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=report,
        )
    output.result(found.to_json(), lambda: _print(found, verbose=output.verbose))


def _print(found: Evaluation, *, verbose: bool) -> None:
    for scores in (found.model, found.against):
        if scores is not None:
            click.echo(f"{click.style(scores.model, bold=True)} ({scores.dtype}, {found.device})")
            _scores(scores)
            click.echo()
    if found.difference is not None and found.against is not None:
        click.echo(click.style(f"{found.model.model} minus {found.against.model}", bold=True))
        rows = [*found.difference.domains.items(), ("overall", found.difference.overall)]
        if len(found.difference.domains) > 1:
            rows.append(("mean over domains", found.difference.mean_over_domains))
        same = found.comparable == "perplexity"
        titles = ("domain", *(("loss", "perplexity") if same else ()), "bits/byte")
        table(titles, [(n, *_difference(d, same)) for n, d in rows], right=range(1, len(titles)))
        if not same:
            paragraph("The tokenizers differ: only bits per byte may be compared.")
        click.echo()
    if found.skipped_documents:
        paragraph(f"{plural(found.skipped_documents, 'document')} too short to score.")
    if verbose:
        heading("How it was measured")
        paragraph(found.protocol)
    else:
        paragraph(f"Windows of {found.context_length} tokens; +- is the standard error over documents; -v says more.")


def _scores(scores: ModelScores) -> None:
    rows = [*scores.domains.items(), ("overall", scores.overall)]
    if len(scores.domains) > 1:
        rows.append(("mean over domains", scores.mean_over_domains))
    titles = ("domain", "documents", "tokens", "loss", "perplexity", "bits/byte")
    table(titles, [(name, *_score(score)) for name, score in rows], right=range(1, 6))


def _score(score: Score) -> tuple[str, ...]:
    return (
        f"{score.documents:,}",
        f"{score.tokens:,}",
        with_error(score.loss, score.loss_stderr),
        f"{score.perplexity:,.2f}" if score.perplexity < 1e6 else f"{score.perplexity:.2e}",
        with_error(score.bits_per_byte, score.bits_per_byte_stderr),
    )


def _difference(difference: Difference, same: bool) -> tuple[str, ...]:
    bits = with_error(difference.bits_per_byte, difference.bits_per_byte_stderr, sign=True)
    if not same or difference.loss is None or difference.perplexity_ratio is None:
        return (bits,)
    return with_error(difference.loss, difference.loss_stderr, sign=True), f"x {difference.perplexity_ratio:.4g}", bits


def with_error(value: float, stderr: float | None, *, sign: bool = False) -> str:
    """``2.314 +-0.021``; without the error where it is not known."""
    shown = f"{value:+.4f}" if sign else f"{value:.4f}"
    return shown if stderr is None else f"{shown} +-{stderr:.4f}"
