"""Exceptions with a hint for the user and the exit code of the command line.

Exit codes: 0 done, 1 failed, 2 usage, 3 refused by the plan, 4 verification failed, 130 interrupted (Ctrl-C),
143 terminated (SIGTERM).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

MISSING = "is required"
"""The rule that a recipe without a key breaks."""
MOST_LINES = 20
MOST_CHARACTERS = 1900
_LONGEST_LINE = 800
_ALIKE = 0.7
"""Minimum `difflib` ratio of a typing error: "stablelm" has 0.53 to "mistral", "rand" has 0.8 to "random"."""
_ALIKE_OF_TWO = 0.5
"""The same for names of two characters, one of which is right."""
_MOST_NAMED = 100


class LlamaMoeError(Exception):
    """An error for the user: what is wrong (value and rule), and how to continue.

    Both may quote untrusted files: control characters are escaped, and text is cut to fit a screen.

    Args:
        message: Names the value and the rule that it breaks.
        hint: How to continue; printed on a separate line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = bounded(printable(message, lines=True))
        self.hint = None if hint is None else bounded(printable(hint, lines=True))
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class UsageError(LlamaMoeError, ValueError):
    """The call itself is wrong: an unknown method, a recipe that does not validate, a bad option."""

    exit_code = 2


class InvalidRecipeError(UsageError):
    """A recipe does not validate.

    Args:
        problems: Path of the key (empty for the recipe as a whole) and the rule that its value breaks.
        title: The first line of the message; empty if one problem is the whole message.
        hint: How to continue.
    """

    def __init__(
        self, problems: Sequence[tuple[str, str]], *, title: str = "the recipe is not valid", hint: str | None = None
    ) -> None:
        self.problems = tuple(problems)
        lines = problem_lines(self.problems)
        text = "\n".join(f"  - {line}" for line in lines)
        super().__init__(f"{title}:\n{text}" if title else lines[0], hint=hint)


def problem_lines(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for every different pair of key and rule."""
    return list(dict.fromkeys(f"{key}: {rule}" if key else rule for key, rule in problems))


class RefusedError(LlamaMoeError, ValueError):
    """The plan refuses: the conversion would be inexact, impossible or unsafe. Nothing was written."""

    exit_code = 3


class CheckpointError(RefusedError):
    """The source's files are missing, broken, unsafe, or disagree with their configuration."""


class VerificationError(LlamaMoeError):
    """The written checkpoint does not match its parent."""

    exit_code = 4


class StoppedError(LlamaMoeError):
    """A training run was terminated by SIGTERM, after writing a checkpoint."""

    exit_code = 143


class ElsewhereError(LlamaMoeError):
    """Another process of a distributed run failed, and reports why; this one ends as well."""


class MissingExtraError(LlamaMoeError, ImportError):
    """A feature needs a package that only an extra installs."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed.",
            hint=f"Install it with: pip install 'llamamoe[{extra}]'",
        )


def printable(text: str, *, lines: bool = False) -> str:
    """Escape characters that control a terminal or are invisible, as ``repr`` does: ESC, bidirectional marks.

    Args:
        text: Any text.
        lines: Keep line breaks.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or (lines and each == "\n") else repr(each)[1:-1] for each in text)


def bounded(text: str) -> str:
    """Cut text to fit a screen: long lines in their middle, many lines at the end, with a note."""
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
    """Leave out the middle: a message begins with its subject and ends with the rule."""
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end]} ... ({len(line) - most:,} characters) ... {line[-end:]}"


def near_misses(value: str, choices: list[str]) -> str:
    """Name the choices similar to ``value``, and then all of them (unless they are too many).

    For user input; see `known_names` for values from untrusted files.
    """
    if not choices:
        return "It has no options."
    spelled = {choice.lower(): choice for choice in reversed(choices)}
    cutoff = _ALIKE if len(value) > 2 else _ALIKE_OF_TWO
    close = [spelled[each] for each in difflib.get_close_matches(value.lower(), spelled, n=3, cutoff=cutoff)]
    start = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return start + known_names(choices)


def known_names(choices: list[str]) -> str:
    """Name all choices, or their number, without guessing which one is meant."""
    return f"Known: {', '.join(choices)}." if len(choices) <= _MOST_NAMED else f"{len(choices):,} names are known."
