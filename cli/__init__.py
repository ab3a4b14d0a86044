"""The command line of llamamoe: parse, call one library function, print."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """The entry point; Ctrl-C while modules are imported and the command line is read ends it with one line, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell had it ignored
        signal.signal(signal.SIGINT, _end)
    _open_streams()
    from .main import main

    main()


def begin() -> None:
    """Make Ctrl-C an exception from here on, so that work in progress can end in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_streams() -> None:
    """Give streams that the caller closed to nobody.

    The first file that is opened would get the number of one, and what libraries print would go into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the stream's own
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _end(*_: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)  # an exception would pass through the interpreter's own imports, of which not all let it through
