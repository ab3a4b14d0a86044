"""``llamamoe fix-config``: make a checkpoint that transformers 5 saved load in 4.57 too."""

from __future__ import annotations

import click

from ._format import plural
from ._output import Output, output_options
from ._style import Command, Option
from ._tables import bullets
from ._text import echo

HELP = """Write into the folder PATH what transformers 4.57 reads.

save_pretrained and the Trainer of transformers 5 write rope and some names in a new spelling only; 4.57 falls back to
its defaults without a word, and computes something else. The old spelling is added to config.json beside the new one.
Experts under the names of memory (save_original_format=False, mergekit) get the names of files, and a tokenizer whose
class 4.57 does not have gets one that both versions have. Transformers 5 loads the same model as before.
"""


@click.command(cls=Command, section="Convert", rank=1, short_help="Make a saved checkpoint readable by 4.57.",
               help=HELP, examples="llamamoe fix-config trained/checkpoint-1000 --dry-run")  # fmt: skip
@click.argument("path")
@click.option("--dry-run", cls=Option, group="This run", is_flag=True, help="Only say what would be changed.")
@output_options
def command(path: str, dry_run: bool, output: Output) -> None:
    """Parse, fix, print."""
    from llamamoe.transforms.fix_config import fix_config

    fixes = fix_config(path, dry_run=dry_run)

    def human() -> None:
        if not (fixes.added or fixes.renamed or fixes.tokenizer):
            echo(f"{path}: nothing is missing.")
            return
        would = "would be " if dry_run else ""
        for file, count in fixes.renamed.items():
            echo(f"{path}/{file}: {plural(count, 'tensor')} {would}written under the names of transformers' files")
        if fixes.tokenizer:
            echo(f"{path}/tokenizer_config.json: {would}written with the class that transformers 4.57 has, too")
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
