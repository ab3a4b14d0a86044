"""Text out of files of others, made safe to show: nothing in it moves a cursor, hides a word or fills a screen."""

from __future__ import annotations

MOST_LINES = 20
MOST_CHARACTERS = 1900
_LONGEST_LINE = 800


def printable(text: str, *, lines: bool = False) -> str:
    """Escape what a terminal would obey or does not show, as ``repr`` does: ESC, bidirectional marks, lone surrogates.

    Args:
        text: Any text.
        lines: Keep line breaks.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or (lines and each == "\n") else repr(each)[1:-1] for each in text)


def bounded(text: str) -> str:
    """Cut text to what fits a screen: long lines in their middle, many lines at the end, and say so."""
    lines = [_cut(line, _LONGEST_LINE) for line in text.split("\n")]
    kept, size = 0, 0
    for line in lines[:MOST_LINES]:
        size += len(line) + 1
        if kept and size > MOST_CHARACTERS:
            break
        kept += 1
    rest = len(lines) - kept
    return "\n".join(lines[:kept] + [f"  ... and {rest} more line{'s' * (rest > 1)}"] * (rest > 0))


def _cut(line: str, most: int) -> str:
    """Leave out the middle: a message begins with what it is about, and ends with the rule."""
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end]} ... ({len(line) - most:,} characters) ... {line[-end:]}"
