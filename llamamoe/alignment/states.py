"""Saved states from which a stopped alignment resumes: files that appear whole or not at all, each with its hash."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import make_folder, save_tensors, write_text
from ..checkpoint.manifest import file_sha256
from ..lazy import np, safetensors, torch
from ..methods.layer import Partition
from .layers import AlignedLayer, Learned

STATE = "state.safetensors"
"""File name of `States`."""
_STEP, _RECORD = "step", ("record.steps", "record.values")
_MATRICES = ("gate", "up", "down")
Record = list[tuple[int, float]]


class States:
    """Learned quantities, Adam's moments, prices and the best state so far, in a folder.

    Args:
        folder: Folder of the state; created if missing.
        layers: The learned layers; read and written in place.
        optimizer: Optimiser of their logits and rows.
    """

    def __init__(self, folder: Path, layers: Mapping[int, Learned], optimizer: torch.optim.Optimizer) -> None:
        self.folder, self._layers, self._optimizer = folder, layers, optimizer
        self._saved = time.monotonic()

    def due(self, seconds: float) -> bool:
        """Return whether the last saved state is old enough to save another one."""
        return time.monotonic() - self._saved > seconds

    def save(self, step: int, record: Record, best: Mapping[int, AlignedLayer]) -> None:
        """Save the state before ``step``; the record must not be empty."""
        make_folder(self.folder)
        tensors: dict[str, torch.Tensor] = {}
        for layer, each in self._layers.items():
            tensors |= {f"{layer}.{name}": value for name, value in self._of_layer(each).items()}
        for layer, kept in best.items():
            tensors |= {f"best.{layer}.{name}": value for name, value in _of_aligned(kept).items()}
        steps, values = zip(*record, strict=True)
        of_record = (torch.tensor(steps), torch.tensor(values, dtype=torch.float64))
        tensors |= {_STEP: torch.tensor(step)} | dict(zip(_RECORD, of_record, strict=True))
        _write(self.folder / STATE, tensors)
        self._saved = time.monotonic()

    def load(self) -> tuple[int, Record, dict[int, AlignedLayer]] | None:
        """Load the saved state and return its step, record and best layers; None if there is no complete state."""
        found = _read(self.folder / STATE)
        if found is None:
            return None
        tensors, _ = found
        best: dict[int, AlignedLayer] = {}
        for layer, each in self._layers.items():
            self._take(each, {n.removeprefix(f"{layer}."): t for n, t in tensors.items() if n.startswith(f"{layer}.")})
            mine = {n.removeprefix(f"best.{layer}."): t for n, t in tensors.items() if n.startswith(f"best.{layer}.")}
            best[layer] = _to_aligned(mine)
        steps, values = (tensors[name].tolist() for name in _RECORD)
        return int(tensors[_STEP]), list(zip(steps, values, strict=True)), best

    def _of_layer(self, each: Learned) -> dict[str, torch.Tensor]:
        assignment = each.assignment
        out = {
            **{name: value.detach() for name, value in each.parameters.items()},
            "labels": torch.from_numpy(assignment.labels_F),
        }
        if assignment._prices_C is not None:
            out["prices"] = torch.from_numpy(np.ascontiguousarray(assignment._prices_C))
        if assignment._soft_prices_C is not None:
            out["soft_prices"] = assignment._soft_prices_C
        for name, parameter in each.parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                out[f"adam.{name}.{key}"] = value.detach()
        return {name: value.cpu() for name, value in out.items()}

    def _take(self, each: Learned, kept: dict[str, torch.Tensor]) -> None:
        assignment, device = each.assignment, each.assignment.logits_FC.device
        with torch.no_grad():
            for name, parameter in each.parameters.items():
                parameter.copy_(kept[name])
        assignment.labels_F = kept["labels"].numpy()
        assignment._prices_C = kept["prices"].numpy() if "prices" in kept else None
        assignment._soft_prices_C = kept["soft_prices"].to(device) if "soft_prices" in kept else None
        for name, parameter in each.parameters.items():
            moments = {n.split(".")[-1]: t for n, t in kept.items() if n.startswith(f"adam.{name}.")}
            if moments:
                # fused steps read the number of steps from the device, too
                self._optimizer.state[parameter] = {key: value.to(device) for key, value in moments.items()}


def save_layers(path: Path, layers: Mapping[int, AlignedLayer]) -> str:
    """Write the learned layers and return the SHA-256 of the file."""
    return _write(
        path, {f"{layer}.{name}": value for layer, each in layers.items() for name, value in _of_aligned(each).items()}
    )


def load_layers(path: Path, sha256: str | None = None) -> dict[int, AlignedLayer] | None:
    """Return the layers that `save_layers` wrote; None if the file is missing, damaged or has another hash."""
    found = _read(path)
    if found is None or sha256 not in (None, found[1]):
        return None
    tensors, _ = found
    layers = sorted({int(name.split(".")[0]) for name in tensors})
    return {
        layer: _to_aligned({n.split(".")[1]: t for n, t in tensors.items() if int(n.split(".")[0]) == layer})
        for layer in layers
    }


def remove_file(path: Path) -> None:
    """Delete a file of `States` or `save_layers`, and its hash, if they are there."""
    for each in (path, path.with_suffix(".sha256")):
        each.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors and, beside them, their file's SHA-256, which is returned."""
    # a stop between the two leaves a file whose hash does not match, and its content is computed again
    save_tensors(path, {name: value.contiguous() for name, value in tensors.items()})
    digest = file_sha256(path) or ""
    write_text(path.with_suffix(".sha256"), digest + "\n")
    return digest


def _read(path: Path) -> tuple[dict[str, torch.Tensor], str] | None:
    """Return the tensors that `_write` wrote and their file's SHA-256; None if missing or incomplete."""
    try:
        digest = path.with_suffix(".sha256").read_text(encoding="utf-8").strip()
        if not digest or file_sha256(path) != digest:
            return None
        return safetensors.torch.load_file(path, backend="pread"), digest
    except (OSError, ValueError):
        return None


def _of_aligned(each: AlignedLayer) -> dict[str, torch.Tensor]:
    part = each.partition
    arrays = {name: np.ascontiguousarray(getattr(part, name)) for name in ("experts", "shared", "omitted")}
    out = {name: torch.from_numpy(array) for name, array in arrays.items()}
    out |= {} if part.router_NH is None else {"router": part.router_NH}
    out |= {} if each.scales_F is None else {"scales": each.scales_F}
    out |= dict(zip(_MATRICES, each.matrices or (), strict=False))
    return {name: value.contiguous() for name, value in out.items()}


def _to_aligned(tensors: dict[str, torch.Tensor]) -> AlignedLayer:
    arrays: dict[str, Any] = {name: tensors[name].numpy() for name in ("experts", "shared", "omitted")}
    partition = Partition(**arrays, router_NH=tensors.get("router"))
    matrices = tuple(tensors[name] for name in _MATRICES) if "gate" in tensors else None
    return AlignedLayer(partition, tensors.get("scales"), matrices)
