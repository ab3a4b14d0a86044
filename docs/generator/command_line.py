"""The page of all commands, read from click."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import click
from llamamoe_cli._style import GENERAL, SECTIONS, Command

from .markdown import code, fenced, prose, table

HEAD = """# Command line

`llamamoe COMMAND --help` prints the same. All commands take `--json`, `-q`/`--quiet` and `-v`/`--verbose`: see
[JSON output](json.md) and [Exit codes](exit-codes.md). Results go to stdout; progress and warnings go to stderr.
`NO_COLOR` turns colours off.

SOURCE, MODEL and PARENT are a folder of safetensors, a `.gguf` file, or a Hub repository (`org/name` or
`hf://org/name@revision`), which is downloaded first; `inspect` and `split --dry-run` read only the headers of its weights.
"""


def pages() -> dict[str, str]:
    """Return the page."""
    root = importlib.import_module("llamamoe_cli.main").root
    context = root.context_class(root, info_name="llamamoe", **root.context_settings)
    commands = sorted((root.get_command(context, name) for name in root.list_commands(context)), key=lambda c: c.order)
    parts = [HEAD, *(_command(each, context) for each in commands), _completion()]
    return {"reference/cli.md": "\n".join(parts)}


def _command(command: Command, parent: click.Context) -> str:
    name = next(n for n in parent.command.list_commands(parent) if parent.command.get_command(parent, n) is command)
    context = command.context_class(command, info_name=name, parent=parent)
    assert command.help, f"the command {name} has no help"
    usage = f"llamamoe {name} {' '.join(command.collect_usage_pieces(context))}"
    parts = [f"## llamamoe {name}\n", f"*{SECTIONS[command.order[0]]}.*\n", fenced(usage), prose(command.help) + "\n"]
    parts += _options(command, context)
    if command.examples:
        parts.append(fenced(command.examples.strip(), "bash"))
    return "\n".join(parts)


def _options(command: Command, context: click.Context) -> Iterator[str]:
    rows = []
    for option in command.get_params(context):
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None and "--help" not in record[0] and option.name not in ("as_json", "quiet", "verbose"):
            group = getattr(option, "group", GENERAL)
            assert record[1], f"{command.name} {record[0]} has no help"
            rows.append((group, code(record[0]), *_default(record[1])))
    for group in dict.fromkeys(row[0] for row in rows):
        found = [row[1:] for row in rows if row[0] == group]
        yield f"**{group}**\n"
        yield table(("option", "what it does", "default"), found)


def _default(text: str) -> tuple[str, str]:
    """Split the help of an option into text and default."""
    about, bracket, rest = text.partition("  [")
    rest = rest.rstrip("]").removeprefix("default: ")
    return prose(about), prose(rest) if bracket else ""


def _completion() -> str:
    shown = importlib.import_module("llamamoe_cli.main").COMPLETION
    return "## Tab completion\n\nFor bash; zsh and fish likewise:\n\n" + fenced(shown, "bash")
