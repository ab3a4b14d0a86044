"""Read a model's origin and training from the files beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.out_folder import HEAL_RECIPE_FILE, RECIPE_FILE
from ..checkpoint.paths import inside
from ..checkpoint.receipts import read_receipts
from ..errors import CheckpointError, UsageError
from ..training.metrics import read_lines
from ..training.ownership import METRICS
from ..training.ownership import RECIPE as TRAINING_RECIPE


def provenance(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a checkpoint from its files; missing facts are empty."""
    block = config.get("llamamoe")
    receipts = read_receipts(folder)
    made = [receipt for receipt in receipts if receipt]
    newest: dict[str, Any] = made[-1] if made else {}
    recipe = next(
        (text for name in (TRAINING_RECIPE, HEAL_RECIPE_FILE, RECIPE_FILE) if (text := _text(folder / name))), None
    )
    return {
        "block": dict(block) if isinstance(block, Mapping) else None,
        "recipe": recipe,
        "weights_sha256": newest.get("weights_sha256"),
        "versions": newest.get("versions"),
        "commands": list(_commands(folder)),
        "calibration_tokens": _number(receipts[0], "calibration", "tokens"),
        "trained": bool(receipts[1] or receipts[2]),
        "derived": [receipt.get("made_by") for receipt in made if receipt.get("made_by")],
    }


def _number(receipt: Mapping[str, Any], *path: str) -> int | None:
    found: Any = receipt
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if type(found) is int else None


def _commands(folder: Path) -> Iterable[str]:
    if (folder / RECIPE_FILE).is_file():
        yield f"llamamoe split SOURCE OUT --recipe {RECIPE_FILE}"
    if (folder / HEAL_RECIPE_FILE).is_file():
        yield f"llamamoe heal MODEL OUT --parent PARENT --recipe {HEAL_RECIPE_FILE}"
    if (folder / TRAINING_RECIPE).is_file():
        yield f"llamamoe pretrain --recipe {TRAINING_RECIPE} --out RUN"


def _text(path: Path) -> str | None:
    try:  # no link out of the folder, because the content is shown
        return inside(path.parent, path.name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, CheckpointError):
        return None


# ---- training -----------------------------------------------------------------------------------------------------


def training_runs(runs: Iterable[str | Path], models: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return curves of the given runs, and of those whose trained model is one of the models.

    Args:
        runs: Folders of ``llamamoe pretrain``.
        models: Name of each model, and its folder.

    Raises:
        UsageError: A folder is not a run, or is the run of another model.
    """
    found = {}
    for model in models.values():
        if (model.parent / METRICS).is_file() and _recipe_of(model) in (None, _recipe_of(model.parent)):
            found[model.parent.resolve()] = model.parent
    for run in runs:
        folder = Path(run).expanduser()
        _check_run(folder, models)
        found[folder.resolve()] = folder
    return [_curves(folder) for folder in found.values()]


def _check_run(folder: Path, models: Mapping[str, Path]) -> None:
    if not (folder / METRICS).is_file():
        raise UsageError(
            f"{folder} holds no {METRICS}, so it is not a training run.", hint="Give the --out of llamamoe pretrain."
        )
    recipe = _recipe_of(folder)
    if recipe is not None and recipe not in {_recipe_of(model) for model in models.values()}:
        raise UsageError(
            f"{folder} is the run of another model: none of {', '.join(models)} was trained by its recipe.",
            hint="Give the run of one of the models, or report the model in its folder model/.",
        )


def _recipe_of(folder: Path) -> str | None:
    """Return the recipe of a run or of a trained model, as written."""
    return _text(folder / TRAINING_RECIPE)


def _curves(folder: Path) -> dict[str, Any]:
    lines = [line for line in read_lines(inside(folder, METRICS)) if "tokens" in line and "loss" in line]
    held_out = [line for line in lines if line.get("kind") == "validation"]
    domains: dict[str, list[list[float]]] = {}
    for line in held_out:
        for name, loss in (line.get("domain_loss") or {}).items():
            domains.setdefault(name, []).append([line["tokens"], loss])
    return {
        "name": folder.resolve().name,
        "train": [[line["tokens"], line["loss"]] for line in lines if line.get("kind") == "train"],
        "validation": [[line["tokens"], line["loss"]] for line in held_out],
        "domain_validation": domains,
    }


def plain(data: Any) -> Any:
    """Return the data with None for numbers that JSON cannot hold."""
    return json.loads(json.dumps(data), parse_constant=lambda _: None)
