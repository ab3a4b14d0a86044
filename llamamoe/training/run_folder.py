"""The folder of a training run: who may write to it, which checkpoints in it are whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import InUseError, lock, open_append, write_text
from ..errors import LlamaMoeError, UsageError
from .metrics import read_lines

if TYPE_CHECKING:
    from .recipe import PretrainRecipe

MARKER = "llamamoe_complete.json"
"""Written last into a checkpoint: names and sizes of its files."""
RECIPE, METRICS, FINAL = "recipe.yaml", "metrics.jsonl", "model"
RECEIPT = "llamamoe_training_receipt.json"
FACTS = "facts.json"
"""Facts about the start of a run, which a resumed one cannot measure again."""
_NAME = re.compile(r"checkpoint-(\d+)$")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else may run in ``folder`` meanwhile; the lock falls with the process, however it ends.

    Raises:
        UsageError: Another run holds it.
        LlamaMoeError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_append(folder / ".lock")
    except OSError as error:
        raise LlamaMoeError(f"{folder} cannot be used: {error.strerror or error}.") from None
    with file:
        try:
            lock(file)
        except InUseError:
            raise UsageError(
                f"another run is working in {folder}.", hint="Wait for it or stop it, or give another --out."
            ) from None
        except OSError as error:
            raise LlamaMoeError(f"{folder} cannot be locked: {error.strerror or error}.") from None
        yield


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if it is none."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that are whole, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and _is_whole(path)]
    return sorted(found, key=step_of)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def complete(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Sync all files of a checkpoint to the disk, then write the marker that makes it count."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_text(checkpoint / MARKER, json.dumps({"files": sizes, **facts}, indent=1) + "\n")


def is_of_the_disk(error: Exception) -> bool:
    """Whether an error that came while files were written is the disk's: ``torch.save`` reports it as RuntimeError.

    With the place in torch where its archive is written, or with that of the stream behind it.
    """
    told = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    return not isinstance(error, RuntimeError) or any(part in told for part in ("inline_container", "iostream"))


def start_anew(recipe: PretrainRecipe, checkpoint: Path) -> str:
    """How to go on from a checkpoint with another recipe, which ``--resume`` refuses: it would be another run."""
    if recipe.lora is not None:  # an adapter alone is no model
        return "a new run, with another --out"
    return f"a new run that begins there, with model={checkpoint} and another --out"


def marker(checkpoint: Path) -> dict[str, Any]:
    """What `complete` wrote."""
    data: dict[str, Any] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    return data


def discard_partial(folder: Path) -> list[str]:
    """Delete checkpoints that a kill left unfinished; returns their names."""
    whole = set(checkpoints(folder))
    broken = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and path not in whole]
    for path in broken:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in broken)


def best_checkpoint(folder: Path) -> tuple[Path, float] | None:
    """The whole checkpoint whose held-out loss is the lowest, and that loss; None if none was measured."""
    path = folder / METRICS
    lines = read_lines(path) if path.exists() else []
    losses = {line["step"]: line["loss"] for line in lines if line.get("kind") == "validation"}
    found = [(losses[step_of(each)], each) for each in checkpoints(folder) if losses.get(step_of(each)) is not None]
    if not found:
        return None
    loss, checkpoint = min(found, key=lambda pair: pair[0])  # of equals the oldest
    return checkpoint, loss


def rotate(folder: Path, keep: int | None) -> None:
    """Delete all but the ``keep`` newest whole checkpoints and the best one."""
    if keep is not None:
        best = best_checkpoint(folder)
        for path in checkpoints(folder)[:-keep]:
            if best is None or path != best[0]:
                shutil.rmtree(path, ignore_errors=True)
