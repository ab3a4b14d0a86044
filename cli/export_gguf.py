"""``llamamoe export-gguf``: a checkpoint for llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._format import size
from ._output import Output, kept_when_interrupted, output_options
from ._style import Command, Option
from ._tables import bullets, facts
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.transforms.export_gguf import GgufExport

HELP = """Write the checkpoint MODEL as the GGUF file OUT, for llama.cpp and programs built on it.

MODEL must be a mixtral, a granitemoeshared, or a qwen2_moe from a calibrated conversion (rescale unit) without further
training; or a dense llama or mistral, such as a parent or the output of --method static. For these llama.cpp computes
what transformers computes, up to rounding; any other model is refused with the reason. Matrices keep their type unless
--dtype is given; quantize the file with llama-quantize.
"""
EXAMPLES = """
llamamoe export-gguf MODEL model.gguf
llamamoe export-gguf MODEL model.gguf --dtype q8_0
"""


@click.command(cls=Command, section="Convert", rank=6, short_help="Write a GGUF file for llama.cpp.",
               help=HELP, examples=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.argument("out")
@click.option("--dtype", cls=Option, group="Result", metavar="NAME", default="auto", show_default=True,
              help="Type of the matrices: auto (as stored), f32, f16, bf16 or q8_0.")  # fmt: skip
@click.option("--pre", cls=Option, group="Result", metavar="NAME",
              help="llama.cpp's name for the pre-tokenizer, if it is not recognised.")  # fmt: skip
@click.option("--force", cls=Option, group="Run", is_flag=True, help="Replace OUT if it exists.")
@output_options
def command(model: str, out: str, dtype: str, pre: str | None, force: bool, output: Output) -> None:
    """Parse, write, print."""
    from llamamoe import export_gguf

    with kept_when_interrupted(out), output.progress() as report:
        found = export_gguf(model, out, dtype=dtype, pre=pre, force=force, progress=report)
    output.result(found.to_json(), lambda: _print(found), summary=True, warnings=found.warnings)


def _print(found: GgufExport) -> None:
    echo(bold(f"{found.out}: {size(found.nbytes)}"))
    facts([("architecture", found.architecture), ("type", found.dtype), ("tensors", str(found.num_tensors))])
    bullets(found.warnings, mark="!")
