"""``llamamoe push``: upload a checkpoint to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import plural, size
from ._output import Interrupted, Output, output_options
from ._style import Command, flag
from ._tables import bullets, facts, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.checkpoint.push import Push

HELP = """Upload the checkpoint in the folder MODEL to the repository ORG/NAME on the Hugging Face Hub.

Weights, configuration, tokenizer, model card, licence, recipe and receipts are uploaded in one commit; other files of the
folder are not. A new repository is private. An interrupted upload leaves the repository as it was, and repeating the
command sends only what is missing. Log in first: hf auth login.
"""
EXAMPLES = """
llamamoe push my-moe my-name/my-moe --dry-run      # list the files; no network
llamamoe push my-moe my-name/my-moe
llamamoe push my-moe my-name/my-moe --public
"""
RUN = "Run"


@click.command(cls=Command, section="Convert", rank=8, short_help="Upload a checkpoint to the Hugging Face Hub.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("repository", metavar="ORG/NAME")
@flag("--public", group=RUN, is_flag=True, text="Create a public repository; an existing one stays as it is.")
@flag("--force", group=RUN, is_flag=True, text="Replace the checkpoint in a repository that holds files already.")
@flag("--dry-run", group=RUN, is_flag=True, text="Check MODEL and list the files to upload, without the network.")
@output_options
def command(model: str, repository: str, public: bool, force: bool, dry_run: bool, output: Output) -> None:
    """Parse, upload, print."""
    from llamamoe import push

    try:
        with output.progress() as report:
            found = push(model, repository, public=public, force=force, dry_run=dry_run, progress=report)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; the repository is as it was, and repeating the command sends what is missing"
        ) from None
    told = {"dry_run": True} if dry_run else {}
    output.result({**told, **found.to_json()}, lambda: _print(found), summary=not dry_run, warnings=found.notes)


def _print(found: Push) -> None:
    deed = "would be uploaded" if found.url is None else "uploaded"
    echo(bold(f"{found.repository}: {plural(len(found.files), 'file')}, {size(found.nbytes)} {deed}"))
    if found.url is None:
        table(("file", "size"), [(name, size(nbytes)) for name, nbytes in found.files.items()], right=(1,))
    else:
        facts([("commit", found.url)])
    rows = [("left out", ", ".join(found.left_out)), ("deleted there", ", ".join(found.deleted))]
    facts([row for row in rows if row[1]])
    bullets(found.notes, mark="!")
