"""``llamamoe tokenize``: text to shards of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._format import amount, duration, plural, size
from ._output import Output, output_options, saying_what_is_left
from ._recipe_options import RecipeName, recipe_file
from ._style import Command, check_resume_or_force, flag, partial_options
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.data.recipe import TokenizeRecipe
    from llamamoe.data.token_plan import TokenizePlan
    from llamamoe.data.tokenize import Tokenized

HELP = """Tokenize text into shards of token ids per domain, which `llamamoe pretrain` reads.

Reads JSON lines (also .gz, .zst), Parquet, folders that datasets saved (save_to_disk) and plain text; --set
text_column=NAME names the field or column with the documents. The domain of a row is its meta.redpajama_set_name, otherwise
the name of its file or folder; a recipe can set it. Documents are separated by the end-of-sequence token and
concatenated; nothing is dropped. Rows without usable text are skipped, counted and reported; with --strict they are an
error.

Files are written to OUT.partial, which is renamed to OUT when it is complete. After an interruption, the same command
with --resume continues. The result does not depend on the number of processes.
"""
EXAMPLES = """
llamamoe tokenize --recipe small --tokenizer MODEL --text texts/ --dry-run
llamamoe tokenize --recipe small --tokenizer MODEL --text texts/ --out tokens
llamamoe tokenize --recipe slimpajama --text SlimPajama-627B/train --workers 64
llamamoe tokenize --recipe my.yaml --set validation.share=0.01 --out tokens --resume
"""
RECIPE, RUN = "Recipe", "Run"


@click.command(cls=Command, section="Train", rank=1, short_help="Tokenize text into shards for pretrain.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@flag("--recipe", group=RECIPE, metavar="FILE|NAME", required=True, type=RecipeName("tokenize"),
       text="A YAML file, or the name of a recipe that ships with llamamoe.")  # fmt: skip
@flag("--set", "overrides", group=RECIPE, metavar="KEY=VALUE", multiple=True,
       text="Set one key of the recipe, such as shard_tokens=1000000; may be repeated.")  # fmt: skip
@flag(
    "--tokenizer",
    group=RECIPE,
    metavar="PATH",
    text="Model folder or .gguf file with the tokenizer, instead of the recipe's.",
)
@flag("--text", group=RECIPE, metavar="PATH", multiple=True,
       text="Text to tokenize, instead of the recipe's: a file, folder or glob; may be repeated.")  # fmt: skip
@flag("--out", group=RUN, metavar="DIR", default="tokens", show_default=True, text="The folder to write.")
@flag("--workers", group=RUN, type=click.IntRange(1), metavar="N",
       text="Number of processes.  [default: the recipe's, else one per core]")  # fmt: skip
@partial_options(RUN)
@flag("--strict", group=RUN, is_flag=True, text="Stop at the first row without usable text.")
@flag("--dry-run", group=RUN, is_flag=True, text="List the input files with an estimate, without reading them.")
@output_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    tokenizer: str | None,
    text: tuple[str, ...],
    out: str,
    workers: int | None,
    resume: bool,
    force: bool,
    strict: bool,
    dry_run: bool,
    output: Output,
) -> None:
    """Parse, then list or tokenise, then print."""
    check_resume_or_force(resume, force)
    given = {"tokenizer": tokenizer, "text": list(text) or None, "workers": workers}
    complete = _recipe(recipe, given, overrides)
    if dry_run:
        from llamamoe.data.token_plan import plan_tokenize

        plan = plan_tokenize(complete)
        output.result({"dry_run": True, **plan.to_json()}, lambda: _print_plan(plan, verbose=output.verbose))
        return
    tokenized = _tokenize(complete, out, output, resume=resume, force=force, strict=strict)
    if tokenized.warnings and not output.as_json:
        bullets(tokenized.warnings, mark="!", err=True)
    output.result(tokenized.to_json(), lambda: _print(tokenized), summary=True)


def _recipe(recipe: str, given: dict[str, Any], overrides: tuple[str, ...]) -> TokenizeRecipe:
    from llamamoe.data.recipe import load_tokenize_recipe

    with recipe_file(recipe, "tokenize") as path:
        return load_tokenize_recipe(path, given=given, overrides=overrides)


def _tokenize(recipe: TokenizeRecipe, out: str, output: Output, **keys: bool) -> Tokenized:
    from llamamoe.data.tokenize import tokenize

    left = Path(f"{Path(out).expanduser()}.partial")
    remark = f"finished files are kept in {left}, --resume continues"
    with saying_what_is_left(left, remark), output.progress() as report:
        return tokenize(recipe, out, progress=report, **keys)


def _print_plan(plan: TokenizePlan, *, verbose: bool) -> None:
    echo(bold(f"{plural(len(plan.files), 'file')}, {size(plan.nbytes)}"))
    by_domain: dict[str, tuple[int, int]] = {}
    for path, domain in plan.files:
        files, nbytes = by_domain.get(domain, (0, 0))
        by_domain[domain] = (files + 1, nbytes + path.stat().st_size)
    rows = [(domain, f"{files:,}", size(nbytes)) for domain, (files, nbytes) in by_domain.items()]
    table(("domain of rows without one", "files", "size"), rows, right=(1, 2), wrap=(0,))
    if verbose:
        heading("Files")
        bullets(str(path) for path, _ in plan.files)
    heading("Estimate")
    facts(
        [
            ("text", size(plan.text_bytes)),
            ("tokens", amount(plan.tokens)),
            ("disk", f"{size(2 * plan.tokens)} (twice that if the vocabulary has more than 65,536 tokens)"),
            ("time", f"{duration(plan.seconds)} on {plural(plan.workers, 'core')}"),
        ]
    )
    echo()
    paragraph("Estimated from file sizes and the speed of one laptop core. Nothing was written.")


def _print(tokenized: Tokenized) -> None:
    index = tokenized.index
    total = sum(entry.tokens for split in index.splits.values() for entry in split.values())
    echo(bold(f"{tokenized.out}: {amount(total)} tokens of {index.tokenizer.name}, {index.dtype}"))
    rows = [
        (
            domain if split == "train" else f"{domain} ({split})",
            f"{entry.documents:,}",
            f"{entry.tokens:,}",
            f"{entry.text_bytes / max(1, entry.tokens):.2f}",
            f"{len(entry.shards):,}",
        )
        for split, entries in index.splits.items()
        for domain, entry in entries.items()
    ]
    table(("domain", "documents", "tokens", "bytes per token", "files"), rows, right=(1, 2, 3, 4), wrap=(0,))
    kept = f", {tokenized.kept} of {plural(tokenized.units, 'unit')} reused" if tokenized.kept else ""
    echo()
    paragraph(f"{plural(len(index.sources), 'input file')} in {duration(tokenized.seconds)}{kept}.")
