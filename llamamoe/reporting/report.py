"""``llamamoe.report``: show loss, routing and costs of a conversion on one page and as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from .._version import __version__
from ..architectures.inspect import Inspection, inspect
from ..checkpoint.files import write_text
from ..checkpoint.locate import name_with_run
from ..checkpoint.paths import refuse_windows_path
from ..data.encoding import windows_of
from ..errors import LlamaMoeError, MissingExtraError, RefusedError, UsageError
from ..evaluation.fitted_text import fitted_text_warnings
from ..evaluation.perplexity import ScoringPlan, check_numbers, encode_again, protocol, scoring_plan, window_length
from ..evaluation.scores import Counts, differences, model_scores
from ..evaluation.scoring import check_ids
from ..models.devices import pick_device
from ..models.loading import open_models
from ..progress import LOADING, Progress, ProgressCallback, counting, ignore_progress
from ..transforms.export_gguf import runs_in_llama_cpp
from .origin import plain, provenance, training_runs
from .walk import Reading

MOST_MODELS = 4
ORACLE_TOKENS = 1024
"""Default number of tokens per domain for which routers are compared with an oracle."""


@dataclass(frozen=True)
class _Side:
    """A model of the report: the facts in its files, and the text in its tokens."""

    inspection: Inspection
    plan: ScoringPlan
    same_tokens: bool


def report(
    models: Sequence[str | Path],
    text: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    out: str | Path | None = None,
    json_out: str | Path | None = None,
    runs: Sequence[str | Path] = (),
    max_tokens: int | None = 8192,
    context_length: int | None = None,
    oracle_tokens: int = ORACLE_TOKENS,
    dtype: str = "auto",
    device: str = "auto",
    command: str = "",
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Run converted models and their dense parent on a text, and write a report.

    Losses are those of `llamamoe.evaluate`. Each model is loaded once, one after the other.

    Args:
        models: One to four converted models, for example after conversion and after training; beside a mixture of experts also
            dense ones, such as a pruned model for comparison.
        text: Files, folders or globs; its domains are compared.
        against: The dense parent: a folder, a ``.gguf`` file or a hub id.
        tokenizer: For a GGUF parent, a folder whose tokenizer is used instead of the one in the file.
        out: Path of the page; None: not written.
        json_out: Path of the same numbers as JSON.
        runs: Folders of `llamamoe.pretrain` whose curves are shown; that of a trained model is found automatically.
        max_tokens: Maximum number of tokens per domain; None: all.
        context_length: Tokens per window; None: the models' positions, at most 2048.
        oracle_tokens: Number of tokens per domain for which routers are compared with an oracle.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: A torch device, or ``"auto"``.
        command: The command that the page shows for reproduction.
        force: Replace existing files.
        progress: Called with the number of tokens read.

    Returns:
        The content of the JSON file.

    Raises:
        RefusedError: No model is a mixture of experts.
        UsageError: A file already exists, a model or text does not exist, or a run is of another model.
        LlamaMoeError: Text or weights cannot be used, see `llamamoe.evaluate`.
        MissingExtraError: The page needs jinja2 and matplotlib (``pip install 'llamamoe[report]'``).
    """
    _check(models, out, json_out, oracle_tokens, force=force)
    check_numbers(max_tokens=max_tokens, context_length=context_length, batch_size=1, dtype=dtype)
    started, device = time.monotonic(), pick_device(device)
    inspections = _named(_inspected(models))
    curves = training_runs(runs, {each.name: Path(each.path) for each in inspections})
    sides, facts = _sides(inspections, against, tokenizer, text, max_tokens, context_length)
    read = _read_all(sides, len(models), dtype, device, oracle_tokens, progress, started)
    read |= {"training": curves, "notes": _notes(sides, against is not None)}
    numbers = plain({"llamamoe": __version__} | facts | {"command": command} | read)
    _write(numbers, out, json_out)
    return cast("dict[str, Any]", numbers)


# ---- what is checked first ----------------------------------------------------------------------------------------


def _check(
    models: Sequence[str | Path],
    out: str | Path | None,
    json_out: str | Path | None,
    oracle_tokens: int,
    *,
    force: bool,
) -> None:
    if out is not None:
        check_extra()
    for each in (out, json_out):
        refuse_windows_path(each or "", "the report")
    places = [Path(each).expanduser() for each in (out, json_out) if each is not None]
    if not 1 <= len(models) <= MOST_MODELS:
        raise UsageError(f"{len(models)} models were given, but a report shows from 1 to {MOST_MODELS}.")
    if oracle_tokens < 0:
        raise UsageError(f"oracle_tokens is {oracle_tokens}, but must not be negative.")
    if len({place.absolute() for place in places}) < len(places):
        raise UsageError(f"the page and the numbers cannot both go to {places[0]}.", hint="Name two files.")
    for place in places:
        if place.absolute().parent.is_dir() and not os.access(place.absolute().parent, os.W_OK):
            raise UsageError(
                f"{place} cannot be written: permission denied in its folder.", hint="Choose another place."
            )
        if place.is_dir() or not place.absolute().parent.is_dir():
            raise UsageError(f"{place} is not a place for a file.", hint="Name a file in a folder that exists.")
        if place.exists() and not force:
            raise UsageError(f"{place} exists.", hint="Choose another name, or --force to replace it.")


def check_extra() -> None:
    """Check the packages that draw the page before minutes are spent on it.

    Raises:
        MissingExtraError: A package that draws the page is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "report", "The page")


def _inspected(models: Sequence[str | Path]) -> list[Inspection]:
    """Return descriptions of the models, of which one at least has experts; others are controls, such as pruned models."""
    found = [inspect(model) for model in models]
    if all(each.experts is None for each in found):
        raise RefusedError(
            f"{found[0].name} is a dense model, so it has no experts to report on.",
            hint="Pass the parent with --against; to measure perplexity alone: llamamoe evaluate.",
        )
    return found


def _named(models: Sequence[Inspection]) -> list[Inspection]:
    """Return models with distinct names."""
    names = [name_with_run(Path(each.path), each.name) for each in models]
    counted = [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [replace(each, name=name) for each, name in zip(models, counted, strict=True)]


def _sides(
    models: Sequence[Inspection],
    against: str | Path | None,
    tokenizer: str | Path | None,
    text: Sequence[str | Path],
    max_tokens: int | None,
    context_length: int | None,
) -> tuple[list[_Side], dict[str, Any]]:
    """Return every model, the parent last, with the text in its own tokens, and the protocol.

    The first model's tokenizer decides the amount of text.
    """
    inspections = [*models, *([] if against is None else [inspect(against)])]
    opened = open_models([Path(each.path) for each in inspections], tokenizer=tokenizer)
    length = window_length(context_length, opened)
    first, _ = scoring_plan(opened[0], text, max_tokens=max_tokens, context_length=length)
    sides = [_Side(inspections[0], first, same_tokens=True)]
    for inspection, side in zip(inspections[1:], opened[1:], strict=True):
        encoded, same = encode_again(first.encoded, side)
        sides.append(_Side(inspection, ScoringPlan(encoded, windows_of(encoded, length), side), same))
    for each in sides:
        check_ids(each.plan.side.name, int(each.plan.side.config.vocab_size), each.plan.encoded)
    return sides, {
        "protocol": protocol(length, max_tokens, opened, all(side.same_tokens for side in sides)),
        "context_length": length,
        "max_tokens": max_tokens,
        "domains": list(first.domains),
    }


# ---- reading ------------------------------------------------------------------------------------------------------


def _read_all(
    sides: Sequence[_Side],
    models: int,
    dtype: str,
    device: str,
    oracle_tokens: int,
    progress: ProgressCallback,
    started: float,
) -> dict[str, Any]:
    """Run the models one after the other; the first ``models`` of ``sides`` are converted, one more is the parent."""
    from .walk import read

    advance = counting("report", sum(int(side.plan.tokens.sum()) for side in sides), "token", progress)
    readings = []
    for number, side in enumerate(sides, start=1):
        progress(Progress(LOADING, number, len(sides), "model", side.inspection.name))
        readings.append(
            read(
                side.plan,
                dtype=dtype,
                device=device,
                mixture=side.inspection.experts is not None,
                oracle_tokens=oracle_tokens,
                advance=partial(advance, side.inspection.name),
            )
        )
    parent = readings[-1] if len(sides) > models else None
    described = [_described(side, reading, parent) for side, reading in zip(sides, readings, strict=True)]
    return {
        "run": {
            "seconds": round(time.monotonic() - started, 1),
            "device": device,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        "parent": None if parent is None else described[-1],
        "models": described[:models],
    }


# ---- plain data ---------------------------------------------------------------------------------------------------


def _described(side: _Side, reading: Reading, parent: Reading | None) -> dict[str, Any]:
    """Return the report's data of one model."""
    from ..checkpoint.json_files import read_json

    found, folder = side.inspection, Path(side.inspection.path)
    scores = asdict(model_scores(found.name, reading.dtype, reading.counts))
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    return {
        "name": found.name,
        "place": found.name if Path(found.path).is_absolute() else str(found.path),
        "dtype": reading.dtype,
        "comparable": "perplexity" if side.same_tokens else "bits_per_byte",
        "scores": {key: scores[key] for key in ("domains", "overall", "mean_over_domains")},
        "difference": _difference(reading.counts, parent, same=side.same_tokens),
        "cost": found.cost.to_json(),
        "target": found.target,
        "llama_cpp": runs_in_llama_cpp(folder),
        "experts": None if found.experts is None else asdict(found.experts),
        "routing": reading.routing,
        "provenance": provenance(folder, config),
    }


def _difference(counts: dict[str, Counts], parent: Reading | None, *, same: bool) -> dict[str, Any] | None:
    if parent is None or parent.counts is counts:
        return None
    return asdict(differences(counts, parent.counts, same))


def _notes(sides: Sequence[_Side], parent: bool) -> list[str]:
    notes = []
    if not all(side.same_tokens for side in sides):
        notes.append("The models tokenise text differently: only bits per byte may be compared.")
    if not parent:
        notes.append("No dense parent was given, so the loss by the conversion is unknown.")
    documents = [each.document for each in sides[0].plan.encoded]
    opened = [side.plan.side for side in sides]
    return [*notes, *fitted_text_warnings(opened, documents), *(note for side in opened for note in side.notes)]


def _write(found: dict[str, Any], out: str | Path | None, json_out: str | Path | None) -> None:
    try:
        if json_out is not None:
            write_text(Path(json_out).expanduser(), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        if out is not None:
            from .page import render

            write_text(Path(out).expanduser(), render(found))
    except OSError as error:
        raise LlamaMoeError(f"the report cannot be written: {error.strerror or error}.") from error
