"""Start a run on all processes or on none: a refusal by one reaches the others before they wait for it.

Torch's own meeting (``init_process_group``) has no word for "I do not come": the others wait for half an hour. Before it the
processes meet at the same address and tell each other that their checks have passed. The first one may take hours
for its own, in which it verifies every byte of a checkpoint.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from ..errors import ElsewhereError, LlamaMoeError
from ..lazy import dist

_PATIENCE = timedelta(days=2)
"""Longest time for the checks of another process."""
_ARRIVAL = timedelta(minutes=30)
"""Longest time between the starts of two processes, that of torch's own meeting."""
_HEARD = timedelta(seconds=20)
"""Longest time in which a process that refuses, and at which the others meet, stays for them to hear of it."""
_PASSED = "passed"
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CALLS = itertools.count()


@contextmanager
def joint_start() -> Iterator[Callable[[], None]]:
    """Yield a function that waits until all processes have called it; an error before it is told to the others.

    In a run of one process it does nothing.

    Raises:
        ElsewhereError: By that function: another process failed before it got there.
    """
    rank, world, store = _meeting_place()
    if store is None:
        yield lambda: None
        return
    told = False

    def join() -> None:
        nonlocal told
        told = True
        _tell(store, rank, _PASSED)
        failed = _first_failure(store, rank, world)
        if failed is not None:
            _leave(store, rank, world)
            raise failed

    try:
        yield join
    except BaseException as error:
        if not told:
            with suppress(RuntimeError):  # the others are gone
                _tell(store, rank, error.message if isinstance(error, LlamaMoeError) else type(error).__name__)
                _leave(store, rank, world)
        raise


def _meeting_place() -> tuple[int, int, Any]:
    """Return this process's rank, the number of processes and the store at which they meet; None for one process."""
    if any(not os.environ.get(name) for name in _NAMES) or os.environ["WORLD_SIZE"] == "1":
        return 0, 1, None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    meeting: Any = dist
    store = meeting.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not hosted,
        timeout=_ARRIVAL,
        wait_for_workers=False,
        multi_tenant=True,  # torch's own meeting is at the same address
    )
    return rank, world, meeting.PrefixStore(f"llamamoe/{next(_CALLS)}", store)


def _tell(store: Any, rank: int, text: str) -> None:
    store.set(f"state/{rank}", text)


def _first_failure(store: Any, rank: int, world: int) -> ElsewhereError | None:
    """Return an error that names the process that failed, and why if the first one is to tell it."""
    for other in range(world):
        try:
            store.wait([f"state/{other}"], _PATIENCE)
            text = store.get(f"state/{other}").decode()
        except RuntimeError:
            text = "it ended"
        if text != _PASSED:
            return ElsewhereError(
                f"process {other} did not start" + (f": {text}" if rank == 0 else ", and reports why.")
            )
    return None


def _leave(store: Any, rank: int, world: int) -> None:
    """Count this process as one that has heard; the first stays for the others, which meet at its address."""
    with suppress(RuntimeError):
        if store.add("heard", 1) == world:
            store.set("all", "")
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            store.wait(["all"], _HEARD)
