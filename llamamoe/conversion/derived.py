"""Refuse to verify what another command than `split` wrote, and say what can be verified instead."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..checkpoint.out_folder import DERIVED_FILE, HEAL_RECIPE_FILE
from ..checkpoint.receipts import read_receipts
from ..errors import RefusedError


class _Other(NamedTuple):
    """The reason why a command's output is not compared with a dense parent, and the way out."""

    does: str
    way: str


_CONVERSION = "Verify the conversion that it was made from; `llamamoe evaluate` compares two models."
_OTHERS = {
    "heal": _Other("trains weights, so that they differ from the parent's", _CONVERSION),
    "merge": _Other(
        "averages weights, so that they differ from the parent's",
        "Verify the conversions that it was made from; `llamamoe evaluate` compares two models.",
    ),
    "mix": _Other(
        "puts the FFNs of several models together, so that it has no single parent",
        "`mix` compares each expert with its model when it writes them, unless --no-verify is given: see `verification` in "
        f"{DERIVED_FILE}.",
    ),
    "retop": _Other(
        "selects another number of experts, so that the record of the conversion does not hold", _CONVERSION
    ),
    "resplit": _Other(
        "partitions experts again, so that the record of the conversion does not hold",
        "`llamamoe evaluate OUT --against MODEL` compares it with the mixture that it was made from.",
    ),
    "densify": _Other(
        "makes a dense model of a mixture",
        "`llamamoe evaluate OUT --against MODEL` compares it with the mixture that it was made from.",
    ),
}


def refuse_derived(folder: Path) -> None:
    """Refuse a folder that a command wrote which makes models of converted ones, or of several dense ones.

    Raises:
        RefusedError: It is one; the message names the command that its receipt names.
    """
    if (folder / HEAL_RECIPE_FILE).is_file():
        made = "heal"
    elif (folder / DERIVED_FILE).is_file():
        made = next((str(each["made_by"]) for each in read_receipts(folder) if "made_by" in each), "")
    else:
        return
    if made not in _OTHERS:
        message = f"{folder} holds a {DERIVED_FILE}, so it was not written by `llamamoe split`."
        raise RefusedError(message, hint=_CONVERSION)
    raise RefusedError(
        f"{folder} was written by `llamamoe {made}`, which {_OTHERS[made].does}.", hint=_OTHERS[made].way
    )
