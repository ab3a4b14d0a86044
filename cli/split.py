"""``llamamoe split``: convert a dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._output import Output, kept_when_interrupted, output_options
from ._recipe_options import WRITING, recipe_file, split_options
from ._style import COUNT, Command, flag, run_options, tokenizer_option

if TYPE_CHECKING:
    from llamamoe.conversion.recipe import SplitRecipe

RECIPE, RUN = "Recipe", "Run"
EXAMPLES = """
llamamoe split SOURCE OUT --experts 8 --top-k 2 --method kmeans
llamamoe split SOURCE OUT --experts 16 --shared 0.25 --dry-run
llamamoe split meta-llama/Llama-3.2-1B OUT --target mixtral --dtype bfloat16
llamamoe split SOURCE OUT --calibration texts/ --calibration-tokens 65536
llamamoe split SOURCE OUT --method token_clusters --experts 24 --top-k 8 --calibration auto
llamamoe split SOURCE OUT --calibration texts/ --align-tokens 1000000
llamamoe split SOURCE OUT --recipe my.yaml --set method.max_iter=50
llamamoe split SOURCE OUT --recipe my.yaml --resume
"""
HELP = """Convert the dense checkpoint SOURCE into a mixture of experts in the folder OUT.

SOURCE is a folder with config.json and safetensors files, a .gguf file, a Hub id (org/name) or hf://org/name@revision.
A Hub model is downloaded to the Hub's cache first; for --dry-run only its small files and the headers of its weights.
Files are written to OUT.partial, which is renamed to OUT once everything in it has been verified.

Flags override the values of the recipe, and --set overrides both.
"""


@click.command(cls=Command, section="Convert", rank=0, short_help="Convert a dense checkpoint into a mixture of experts.", help=HELP,
               examples=EXAMPLES)  # fmt: skip
@click.argument("source")
@click.argument("out", required=False)
@flag(
    "--recipe", group=RECIPE, metavar="FILE|NAME", text="A YAML file, or the name of a recipe that ships with llamamoe."
)
@flag("--set", "overrides", group=RECIPE, metavar="KEY=VALUE", multiple=True,
       text="Set one key of the recipe, such as method.max_iter=50; may be repeated.")  # fmt: skip
@split_options
@flag("--align-tokens", group="Calibration", metavar="N", type=COUNT, key="align.tokens",
       text="Learn the partition, router and FFN weights of all layers jointly on this many calibration tokens, by "
       "distillation from the dense model (align.* in a recipe sets learning rates and more).  [default: none]")  # fmt: skip
@flag("--strict", group=WRITING, is_flag=True,
       text="Turn warnings into errors, for example about weights that are not finite.")  # fmt: skip
@flag("--no-card", key="card", group=WRITING, is_flag=True, text="Do not write a model card.")
@flag("--dry-run", group=RUN, is_flag=True, text="Print the plan and do not write OUT; only file headers are read.")
@run_options(RUN, resume="Resume an interrupted run of the same command.",
              force="Replace an existing checkpoint in OUT and discard the files of an interrupted run.")  # fmt: skip
@tokenizer_option(RUN)
@flag("--no-verify", group=RUN, is_flag=True,
       text="Skip the comparison of the result with SOURCE.")  # fmt: skip
@output_options
def command(
    source: str,
    out: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    align_tokens: int | None,
    strict: bool,
    no_card: bool,
    dry_run: bool,
    resume: bool,
    force: bool,
    tokenizer: str | None,
    no_verify: bool,
    output: Output,
    **given: Any,
) -> None:
    """Parse, then plan or convert, then print."""
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT': the folder to write.")
    given |= {"strict": strict or None, "card": False if no_card else None}
    aligned = () if align_tokens is None else (f"align.tokens={align_tokens}",)
    complete = _recipe(recipe, given, (*aligned, *overrides))
    keys: dict[str, Any] = {"verify": not no_verify, "resume": resume, "force": force, "tokenizer": tokenizer}
    if dry_run:
        _plan(source, out, complete, output, **keys)
    else:
        assert out is not None
        _convert(source, Path(out).expanduser(), complete, output, **keys)


def _recipe(recipe: str | None, given: dict[str, Any], overrides: tuple[str, ...]) -> SplitRecipe:
    from llamamoe.conversion.recipe import load_recipe

    with recipe_file(recipe) as path:
        return load_recipe(path, given=given, overrides=overrides)


def _plan(
    source: str,
    out: str | None,
    recipe: SplitRecipe,
    output: Output,
    *,
    verify: bool,
    resume: bool,
    force: bool,
    tokenizer: str | None,
) -> None:
    from llamamoe.conversion.split import plan_conversion

    from ._plan import print_plan

    plan = plan_conversion(source, recipe, out=out, resume=resume, force=force, tokenizer=tokenizer)
    output.result(
        {"dry_run": True, "out": out, **plan.to_json()},
        lambda: print_plan(plan, source, verify=verify, verbose=output.verbose),
    )


def _convert(source: str, out: Path, recipe: SplitRecipe, output: Output, **keys: Any) -> None:
    from llamamoe import split

    from ._outcome import print_result
    from ._plan import print_warnings

    with kept_when_interrupted(out), output.progress() as report:
        result = split(source, out, recipe, progress=report, **keys)
    if output.quiet:
        print_warnings(result.warnings, err=True)
    output.result({"out": str(out), **result.receipt}, lambda: print_result(result), summary=True)
