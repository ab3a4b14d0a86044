"""``llamamoe evaluate``: perplexity and bits per byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llamamoe.errors import LlamaMoeError

from ._format import plural
from ._output import Output, output_options
from ._plan import print_warnings
from ._recipe_options import recipe_file
from ._style import COUNT, Command, Option, model_options, tokenizer_option
from ._tables import heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.evaluation.scores import Difference, Evaluation, ModelScores, Score
    from llamamoe.evaluation.task_scores import TaskScore
    from llamamoe.evaluation.tasks import TaskEvaluation

HELP = """Measure how well MODEL predicts text (perplexity and bits per byte, by domain and overall), or its accuracy on tasks of
lm-evaluation-harness.

MODEL is any causal language model that transformers loads (a folder or a Hub id), or a .gguf file that `llamamoe split`
supports. With --against, a second model is measured on the same text or questions, and the paired difference is given
with its standard error and 95 % confidence interval.
"""
EXAMPLES = """
llamamoe evaluate OUT --text wiki.txt --text code/ --max-tokens 100000
llamamoe evaluate OUT --text corpus.jsonl --against SOURCE --json
llamamoe evaluate OUT --tasks arc_easy,piqa --limit 200 --against SOURCE
llamamoe evaluate OUT --recipe llama_moe_paper
"""
TEXT, TASKS, RUN = "Text", "Tasks (llamamoe[eval])", "Execution"


@click.command(cls=Command, section="Measure", rank=0, short_help="Measure perplexity by domain, or accuracy on tasks.", help=HELP,
               examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.option("--text", cls=Option, group=TEXT, metavar="PATH", multiple=True,
              help="Text to measure on: a file, folder or glob (txt, jsonl, parquet; also .gz, .zst); may be repeated.")  # fmt: skip
@click.option("--max-tokens", cls=Option, group=TEXT, type=COUNT, metavar="N",
              help="Maximum number of tokens per domain.  [default: all]")  # fmt: skip
@click.option("--context-length", cls=Option, group=TEXT, type=COUNT, metavar="N",
              help="Number of tokens per window.  [default: the model's context length, at most 2048]")  # fmt: skip
@click.option("--stride", cls=Option, group=TEXT, type=COUNT, metavar="N",
              help="Use sliding windows that start every N tokens; each scores only its new tokens.  [default: no overlap]")  # fmt: skip
@click.option(
    "--tasks",
    cls=Option,
    group=TASKS,
    metavar="NAME,NAME",
    help="Tasks of lm-evaluation-harness, instead of a recipe's.",
)
@click.option(
    "--recipe",
    cls=Option,
    group=TASKS,
    metavar="FILE|NAME",
    help="A YAML file with tasks, or the name of a recipe that ships with llamamoe.",
)
@click.option("--few-shot", cls=Option, group=TASKS, type=int, metavar="N",
              help="Few-shot examples before each question of --tasks.  [default: the task's own number]")  # fmt: skip
@click.option(
    "--limit",
    cls=Option,
    group=TASKS,
    type=int,
    metavar="N",
    help="Maximum number of questions per task.  [default: all]",
)
@click.option("--include", cls=Option, group=TASKS, multiple=True, metavar="DIR",
              help="A folder with your own tasks, as YAML files of the harness; may be repeated.")  # fmt: skip
@click.option(
    "--against", cls=Option, group=RUN, metavar="OTHER", help="Measure this model too, and report the difference."
)
@click.option("--batch-size", cls=Option, group=RUN, type=int, default=8, show_default=True, metavar="N",
              help="Number of windows per batch.")  # fmt: skip
@tokenizer_option(RUN)
@model_options(RUN, several=True)
@output_options
def command(
    model: str, text: tuple[str, ...], max_tokens: int | None, context_length: int | None, stride: int | None,
    tasks: str | None, recipe: str | None, few_shot: int | None, limit: int | None, include: tuple[str, ...],
    against: str | None, batch_size: int, tokenizer: str | None, dtype: str, device: str, output: Output,
) -> None:  # fmt: skip
    """Parse, evaluate, print."""
    from llamamoe.evaluation.perplexity import evaluate

    asked = bool(tasks or recipe)
    if asked == bool(text):
        raise click.UsageError("Give either --text or tasks (--tasks, --recipe).")
    if asked:
        if any(value is not None for value in (max_tokens, context_length, stride)):
            raise click.UsageError("--max-tokens, --context-length and --stride belong to --text.")
        keys: dict[str, Any] = {"against": against, "batch_size": batch_size, "dtype": dtype, "device": device}
        keys["tokenizer"] = tokenizer
        _tasks(model, recipe, _given(tasks, few_shot, limit, include), output, keys)
        return
    if few_shot is not None or limit is not None or include:
        raise click.UsageError("--few-shot, --limit and --include belong to tasks.")
    with output.progress() as report:
        evaluation = evaluate(
            model,
            text,
            against=against,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            context_length=context_length,
            stride=stride,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=report,
        )
    output.result(evaluation.to_json(), lambda: _print(evaluation, verbose=output.verbose))


def _given(tasks: str | None, few_shot: int | None, limit: int | None, include: tuple[str, ...]) -> dict[str, Any]:
    """Keys of the recipe that options set."""
    if few_shot is not None and tasks is None:
        raise click.UsageError("--few-shot belongs to --tasks; a recipe has num_fewshot for each of its tasks.")
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else []
    named = [{"task": name, "num_fewshot": few_shot} for name in names]
    return {"tasks": named or None, "limit": limit, "include": list(include) or None}


def _tasks(model: str, recipe: str | None, given: dict[str, Any], output: Output, keys: dict[str, Any]) -> None:
    from llamamoe.evaluation.tasks import evaluate_tasks, load_task_recipe

    with recipe_file(recipe, "eval") as path:
        complete = load_task_recipe(path, given=given)
    with output.progress() as report:
        evaluation = evaluate_tasks(model, complete, progress=report, **keys)
    output.result(evaluation.to_json(), lambda: _print_tasks(evaluation))
    if evaluation.failed:
        raise LlamaMoeError("; ".join(evaluation.failed.values()), hint="The other results are above.")


def _print_tasks(evaluation: TaskEvaluation) -> None:
    heading(f"{evaluation.model}, {evaluation.dtype}, by lm-evaluation-harness {evaluation.harness}")
    titles = ("task", "metric", "shots", "questions", "value", "against", "difference", "95 % interval")
    rows = [_task_row(score) for score in evaluation.scores]
    columns = titles if evaluation.against else titles[:5]
    table(columns, [row[: len(columns)] for row in rows], right=range(2, len(columns)))
    if evaluation.against:
        echo()
        paragraph(f"against: {evaluation.against}. Differences are paired by question; +- is one standard error.")
    print_warnings(evaluation.warnings)


def _task_row(score: TaskScore) -> tuple[str, ...]:
    error = "" if score.stderr is None else f" +-{score.stderr:.3f}"
    return (
        score.task,
        score.metric,
        "" if score.num_fewshot is None else str(score.num_fewshot),
        f"{score.questions:,}",
        f"{score.value:.4f}{error}",
        "" if score.against is None else f"{score.against:.4f}",
        "" if score.difference is None else f"{score.difference:+.4f}",
        "" if score.interval is None else f"{score.interval[0]:+.4f} to {score.interval[1]:+.4f}",
    )


def _print(evaluation: Evaluation, *, verbose: bool) -> None:
    for scores in (evaluation.model, evaluation.against):
        if scores is not None:
            echo(bold(scores.model), f" ({scores.dtype}, {evaluation.device})")
            _scores(scores)
            echo()
    if evaluation.difference is not None and evaluation.against is not None:
        echo(bold(f"{evaluation.model.model} minus {evaluation.against.model}"))
        rows = [*evaluation.difference.domains.items(), ("overall", evaluation.difference.overall)]
        if len(evaluation.difference.domains) > 1:
            rows.append(("mean over domains", evaluation.difference.mean_over_domains))
        same = evaluation.comparable == "perplexity"
        titles = ("domain", *(("loss", "95 % interval", "perplexity") if same else ()), "bits/byte", "95 % interval")
        table(titles, [(n, *_difference(d, same)) for n, d in rows], right=range(1, len(titles)))
        if not same:
            paragraph("The tokenizers differ, so only bits per byte can be compared.")
        echo()
    if evaluation.skipped_documents:
        paragraph(f"{plural(evaluation.skipped_documents, 'document')} skipped: too short to score.")
    if verbose:
        heading("How it was measured")
        paragraph(evaluation.protocol)
    else:
        sliding = f", one every {evaluation.stride}" if evaluation.stride else ""
        paragraph(
            f"Windows of {evaluation.context_length} tokens{sliding}; +- is the standard error over documents; -v shows details."
        )
    print_warnings(evaluation.warnings)


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
    bits = (
        with_error(difference.bits_per_byte, difference.bits_per_byte_stderr, sign=True),
        _interval(difference.bits_per_byte_interval),
    )
    if not same or difference.loss is None or difference.perplexity_ratio is None:
        return bits
    loss = with_error(difference.loss, difference.loss_stderr, sign=True), _interval(difference.loss_interval)
    return *loss, f"x {difference.perplexity_ratio:.4g}", *bits


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"


def with_error(value: float, stderr: float | None, *, sign: bool = False) -> str:
    """``2.314 +-0.021``; without the error where it is not known."""
    shown = f"{value:+.4f}" if sign else f"{value:.4f}"
    return shown if stderr is None else f"{shown} +-{stderr:.4f}"
