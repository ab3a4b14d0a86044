"""``llamamoe bench --program llama.cpp``: the speed of models as GGUF files in llama.cpp, beside the parent's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.locate import locate
from ...checkpoint.scratch import scratch_folder
from ...evaluation.bench import checked_sizes
from ...progress import ProgressCallback, counting, ignore_progress
from .measure import DENSE, SHAPE, Rate, alternate, rates_of
from .runtimes import LlamaCpp, Load


@dataclass(frozen=True)
class LlamaCppSpeeds:
    """Tokens per second in llama.cpp.

    Attributes:
        model: The model's name.
        against: Its parent's, or None.
        repeats: Number of turns.
        rates: Those of the model by task (``decode 1``, ``prefill``); ratios are to the parent's in the same turn, 1
            without a parent.
        parent_rates: Those of the parent; None without one.
        facts: Versions and threads.
    """

    model: str
    against: str | None
    repeats: int
    rates: dict[str, Rate]
    parent_rates: dict[str, Rate] | None
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return {"program": LlamaCpp.name, **asdict(self)}


def bench_llama_cpp(
    model: str | Path,
    *,
    against: str | Path | None = None,
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: int = 256,
    new_tokens: int = 24,
    repeats: int = 3,
    progress: ProgressCallback = ignore_progress,
) -> LlamaCppSpeeds:
    """Measure decoding and prefill in llama.cpp on this machine, the model and its parent in alternating turns.

    A folder or hub id is exported to a temporary GGUF file in its own dtype (`llamamoe.export_gguf`); a ``.gguf`` file is
    read as it is. Prompts and continuations are random tokens.

    Args:
        model: A folder, a ``.gguf`` file or a hub id.
        against: The parent, measured in the same way.
        batch_sizes: Numbers of sequences that are decoded together, each 1 or more.
        prompt_tokens: Tokens of the prompt for prefill, at least 2.
        new_tokens: Tokens to decode.
        repeats: Turns, at least 1.
        progress: Called after every reading.

    Raises:
        MissingExtraError: There is no interpreter with ``xllamacpp``.
        RefusedError: llama.cpp cannot run a model.
        UsageError: A number is out of range, or a model does not exist.
        LlamaMoeError: llama.cpp failed.
    """
    sizes = checked_sizes(batch_sizes, prompt_tokens, new_tokens, repeats)
    runtime, load = LlamaCpp(), Load(prompt_tokens, new_tokens, sizes)
    places = {DENSE: locate(model if against is None else against)}
    if against is not None:
        places[SHAPE] = locate(model)
    tell = counting("bench", repeats * len(places), "reading", progress)
    with scratch_folder() as room:
        files = {}
        for name, place in places.items():
            inside = room / name
            inside.mkdir()
            files[name] = place.path if place.path.suffix == ".gguf" else runtime.prepare(place.path, inside)
        rates = rates_of(alternate(runtime, files, load, repeats, tell))
    own, parent = (SHAPE, rates[DENSE]) if against is not None else (DENSE, None)
    names = (places[own].name, places[DENSE].name if parent else None)
    return LlamaCppSpeeds(*names, repeats, rates[own], parent, runtime.facts())
