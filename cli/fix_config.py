"""``llamamoe fix-config``: make a checkpoint that transformers 5 saved load in 4.57 too."""

from __future__ import annotations

import click

from ._format import plural
from ._output import Output, output_options
from ._style import Command, Option
from ._tables import bullets
from ._text import echo

HELP = """Make the checkpoint in the folder PATH, saved by transformers 5, load in transformers 4.57 too.

transformers 5 (save_pretrained, Trainer) writes the RoPE settings and some other keys under new names only. 4.57 ignores
these silently, uses its defaults and computes something else. This command adds the old names to config.json next to the
new ones. Expert tensors that were saved under their in-memory names (save_original_format=False, mergekit) are renamed to
the names used in files, and a tokenizer class that 4.57 does not have is replaced by one that both versions have.
transformers 5 loads the same model as before.
"""


@click.command(cls=Command, section="Convert", rank=1, short_help="Make a checkpoint load in transformers 4.57.",
               help=HELP, examples="llamamoe fix-config trained/checkpoint-1000 --dry-run")  # fmt: skip
@click.argument("path")
@click.option("--dry-run", cls=Option, group="Run", is_flag=True, help="Print the changes without making them.")
@output_options
def command(path: str, dry_run: bool, output: Output) -> None:
    """Parse, fix, print."""
    from llamamoe.transforms.fix_config import fix_config

    fixes = fix_config(path, dry_run=dry_run)

    def human() -> None:
        if not (fixes.added or fixes.renamed or fixes.tokenizer):
            echo(f"{path}: nothing to change.")
            return
        would = "would be " if dry_run else ""
        for file, count in fixes.renamed.items():
            echo(f"{path}/{file}: {plural(count, 'tensor')} {would}renamed to the names used in transformers files")
        if fixes.tokenizer:
            echo(f"{path}/tokenizer_config.json: {would}written with a class that transformers 4.57 has too")
        if fixes.added:
            echo(f"{path}/config.json: {plural(len(fixes.added), 'key')} {would}added")
            bullets(fixes.added, mark="+")

    result = {
        "path": path,
        "dry_run": dry_run,
        "added": fixes.added,
        "renamed": fixes.renamed,
        "tokenizer": fixes.tokenizer,
    }
    output.result(result, human, summary=not dry_run)
