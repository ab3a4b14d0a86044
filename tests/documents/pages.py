"""The pages for readers: their blocks of code, and how commands in them are run."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
SHRUNK = {
    "pretrain": [
        *("--set", "tokens=null", "--set", "steps=2", "--set", "data.block_length=32"),
        *("--set", "data.validation_blocks=1", "--set", "batch_size=2"),
    ],
    "heal": ["--set", "epochs=1", "--set", "length=64", "--tokens", "1024"],
    "evaluate": ["--max-tokens", "256", "--context-length", "128"],
    "bench": ["--prompt", "8", "--new-tokens", "2", "--repeats", "1"],
    "report": ["--oracle-tokens", "64", "--max-tokens", "256", "--context-length", "128"],
}
LITTLE_TEXT = ["--calibration-tokens", "256", "--calibration-length", "32"]
"""Options that make commands short enough for a test."""


def blocks(text: str, *languages: str) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code in these languages, in order."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language in languages:  # found in turns, opening and closing, whatever the language
            yield language, block


def commands(block: str) -> list[list[str]]:
    """The arguments of every ``llamamoe`` in a block, in order."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("llamamoe ")]


def run(arguments: list[str]) -> str:
    """Run one command as a reader would type it, made small; return what it printed."""
    root = importlib.import_module("llamamoe_cli.main").root
    less = LITTLE_TEXT if "--calibration-tokens" in arguments else []
    result = CliRunner().invoke(root, arguments + SHRUNK.get(arguments[0], []) + less)
    assert result.exit_code == 0, f"llamamoe {shlex.join(arguments)}\n{result.output}\n{result.exception!r}"
    return result.output
