"""Pieces of Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells may hold any text on one line."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell(each) for each in line)} |" for line in lines) + "\n"


def cell(text: str) -> str:
    """Return text that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: object) -> str:
    """Return text in code marks, also where a bar would end the cell of a table."""
    return f"<code>{html.escape(str(text)).replace('|', '&#124;')}</code>" if "|" in str(text) else f"`{text}`"


def fenced(text: str, language: str = "text") -> str:
    """Return a block of code."""
    return f"```{language}\n{text.rstrip()}\n```\n"


def prose(text: str) -> str:
    """Return a docstring's or an option's text as Markdown: what it says in <angles> is kept literally."""
    return re.sub(r"<(\w+)>", r"`<\1>`", text.replace("``", "`"))
