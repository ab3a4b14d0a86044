"""The sentence in ``config.json`` on what a mix computes exactly."""

from __future__ import annotations


def mix_exactness(rest: str, pieces: int = 1) -> str:
    """Return a sentence on what the output of a mix equals.

    Args:
        rest: Words for what gives attention, norms, embedding and head; see `rest_of`.
        pieces: Experts into which each expert was split since.
    """
    if pieces == 1:
        return f"exact with one expert selected: it computes {rest} with the FFNs of that expert's model"
    return f"exact with the {pieces} pieces of one expert selected: they compute {rest} with the FFNs of that expert's model"


def rest_of(backbone: object) -> str:
    """Return words for what gives attention, norms, embedding and head, by the recipe's ``backbone``."""
    return "BASE" if backbone == "base" else "the averaged backbone"
