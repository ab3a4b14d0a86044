"""Tables and paragraphs on stdout."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from llamamoe.errors import printable

from ._rich import rich
from ._text import Styled, bold, echo


def width() -> int:
    """Columns to write into: the terminal's, or many where stdout is none, so that a row stays a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 200


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    wrap: Iterable[int] | None = None,
    indent: int = 2,
) -> None:
    """Print a table.

    Args:
        header: Titles; all empty for none.
        rows: Cells.
        right: Columns to flush right.
        wrap: Columns that are wrapped where the terminal is narrow; None: the last.
        indent: Spaces before it.
    """
    aligned = set(right)
    wrapped = [len(header) - 1] if wrap is None else list(wrap)
    grid = rich.table.Table(
        box=None, show_header=any(header), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, title in enumerate(header):
        grid.add_column(
            title,
            justify="right" if index in aligned else "left",
            no_wrap=index not in wrapped,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(rich.text.Text(printable(cell)) for cell in row))
    console = rich.console.Console(file=sys.stdout, width=width(), highlight=False)
    with console.capture() as captured:
        console.print(rich.padding.Padding(grid, (0, 0, 0, indent), expand=False))
    for line in captured.get().splitlines():
        echo(Styled(line.rstrip()))  # cells were escaped


def facts(pairs: Iterable[tuple[str, str]], *, indent: int = 2) -> None:
    """Print names and what they are, one a line."""
    table(("", ""), pairs, indent=indent)


def heading(text: str, *, err: bool = False) -> None:
    """Print a title after an empty line."""
    echo("\n", bold(text), err=err)


def bullets(lines: Iterable[str], *, mark: str = "-", err: bool = False) -> None:
    """Print one wrapped item for each line."""
    for line in lines:
        echo(textwrap.fill(line, width(), initial_indent=f"  {mark} ", subsequent_indent="    "), err=err)


def paragraph(text: str) -> None:
    """Print wrapped text."""
    echo(textwrap.fill(text, width(), initial_indent="  ", subsequent_indent="  "))
