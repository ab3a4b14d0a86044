"""Output of commands: a result for people or as JSON on stdout, progress and warnings on stderr."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from llamamoe.errors import LlamaMoeError
from llamamoe.progress import ProgressCallback, ignore_progress

from ._style import Option
from ._tables import bullets
from ._text import Styled, echo, json_text

VERBOSE = "llamamoe.verbose"
"""Key in ``Context.meta``: whether ``-v`` was given."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


class Interrupted(LlamaMoeError):
    """The user pressed Ctrl-C, or the process was told to end (SIGTERM)."""

    def __init__(self, remark: str = "", *, terminated: bool = False) -> None:
        super().__init__(("terminated" if terminated else "interrupted") + (f"; {remark}" if remark else ""))
        self.exit_code = 128 + (signal.SIGTERM if terminated else signal.SIGINT)

    @classmethod
    def leaving(cls, left: Path, remark: str, *, terminated: bool = False) -> Interrupted:
        """With ``remark`` if there is something at ``left``; else nothing was written."""
        return cls(remark if left.exists() else "nothing was written", terminated=terminated)


@contextmanager
def saying_what_is_left(left: Path, remark: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM as an error with ``remark`` if there is something at ``left``; else nothing was written."""
    try:
        with _termination_raised():
            yield
    except KeyboardInterrupt as error:
        raise Interrupted.leaving(left, remark, terminated=isinstance(error, Terminated)) from None


@contextmanager
def kept_when_interrupted(out: str | Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM, while OUT is put together, as an error that says what is left of it."""
    from llamamoe.checkpoint.ledger import partial_path

    left = partial_path(Path(os.path.abspath(Path(out).expanduser())))
    with saying_what_is_left(left, f"{left} is kept, --resume continues"):
        yield


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, where nothing else handles it; a second one ends the process at once."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass(frozen=True)
class Output:
    """Output settings from the command line.

    Attributes:
        as_json: One JSON document on stdout and nothing else there.
        quiet: No progress, no summary; what was asked for (a table, a plan, JSON) is still printed.
        verbose: More of everything.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def result(
        self, data: Any, human: Callable[[], None], *, summary: bool = False, warnings: Sequence[str] = ()
    ) -> None:
        """Print a result.

        Args:
            data: It as plain data.
            human: Prints it for people.
            summary: Whether it only tells how a deed went, so that ``-q`` leaves it out.
            warnings: What ``-q`` still says, on stderr.
        """
        if self.as_json:
            echo(Styled(json_text(_finite(data))))
        elif summary and self.quiet:
            bullets(warnings, mark="!", err=True)
        else:
            human()

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """Show progress on stderr: a bar on a terminal, else a plain line now and then, with ``-q`` nothing."""
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if self.quiet or not terminal:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if self.quiet:
            yield ignore_progress
            return
        from ._progress import live_bar, plain_lines

        with (live_bar if terminal else plain_lines)(verbose=self.verbose) as report:
            yield report


def _finite(value: Any) -> Any:
    """The same data with null in the place of numbers that JSON cannot hold, and tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--json``, ``-q`` and ``-v``; it receives them as ``output``, an `Output`."""

    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, quiet: bool, verbose: bool, **keys: Any) -> None:
        click.get_current_context().meta[VERBOSE] = verbose
        if quiet and verbose:
            raise click.UsageError("-q and -v are mutually exclusive.")
        function(*args, output=Output(as_json, quiet, verbose), **keys)

    flags = {
        "as_json": (("--json",), "Print one JSON document on stdout and nothing else."),
        "quiet": (("-q", "--quiet"), "Suppress progress and summaries."),
        "verbose": (("-v", "--verbose"), "Print more detail, and the traceback of an unexpected error."),
    }
    for name, (spellings, text) in reversed(flags.items()):
        click.option(*spellings, name, cls=Option, is_flag=True, help=text)(wrapped)
    return wrapped
