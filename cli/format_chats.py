"""``llamamoe format-chats``: instruction and preference data for TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import plural
from ._output import Output, output_options
from ._style import Command, flag
from ._tables import bullets, heading, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.data.format_chats import FormattedChats

HELP = """Write instruction or preference data of the usual formats as the rows that `trl sft` and `trl dpo` read.

FILES are .jsonl (also .gz and .zst), .json (a list) or .parquet. The format of each row is recognised by its fields: ShareGPT,
Firefly, Alpaca, OpenAI's messages, prompt and completion; preferences as prompt, chosen and rejected, in ShareGPT's form, or as
whole conversations (HH-RLHF, UltraFeedback). Rows that are not usable, such as conversations without an answer, are left out
and counted.
"""
EXAMPLES = """
llamamoe format-chats sharegpt.json firefly-train.jsonl --out conversations.jsonl
llamamoe format-chats ultrafeedback.parquet --out preferences.jsonl
trl sft --config recipes/sft/lora.yaml --model_name_or_path my-moe --output_dir my-moe-sft
"""


@click.command(cls=Command, section="Train", rank=5, short_help="Write instruction or preference data for TRL.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("files", nargs=-1, required=True)
@flag("--out", group="Output", metavar="FILE", required=True, text="The .jsonl file to write.")
@flag("--force", group="Output", is_flag=True, text="Replace an existing file.")
@output_options
def command(files: tuple[str, ...], out: str, force: bool, output: Output) -> None:
    """Parse, write, print."""
    from llamamoe import format_chats

    with output.progress() as report:
        found = format_chats(files, out, force=force, progress=report)
    output.result(found.to_json(), lambda: _print(found), summary=True, warnings=found.reasons)


def _print(found: FormattedChats) -> None:
    rows = {"conversations": "conversation", "preferences": "preference"}[found.kind]
    echo(bold(f"{found.out}: {plural(found.rows, rows)}"))
    table(("format", "rows"), [(name, f"{count:,}") for name, count in found.formats.items()], right=(1,))
    if found.left_out:
        heading(
            f"Left out: {plural(found.left_out, 'row')}"
            + (", the first of them" if found.left_out > len(found.reasons) else "")
        )
        bullets(found.reasons, mark="!")
