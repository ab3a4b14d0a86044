"""The one place from which text reaches the terminal: what files of others hold is escaped here."""

from __future__ import annotations

import json
from typing import Any

import click

from llamamoe.errors import printable


class Styled(str):
    """Text that was escaped and then given a colour or weight; see `styled`."""

    __slots__ = ()


def styled(text: str, **style: Any) -> Styled:
    """Escape text and style it; the arguments are those of ``click.style``."""
    return Styled(click.style(printable(text), **style))


def bold(text: str) -> Styled:
    """Escape text and make it bold."""
    return styled(text, bold=True)


def echo(*parts: str, err: bool = False, nl: bool = True) -> None:
    """Print the parts, one after the other, with control characters escaped in all that are not `Styled`.

    Args:
        parts: What to print.
        err: On stderr.
        nl: With a line break at the end.
    """
    text = "".join(each if isinstance(each, Styled) else printable(each, lines=True) for each in parts)
    click.echo(text, err=err, nl=nl)


def json_text(data: Any) -> str:
    """Return a JSON document in which what is not printable is escaped as JSON does."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)
