"""Check that a folder holds what was planned: every tensor, every key, and the parent's weights, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..architectures.moe_layout import Constant, Heads, Neurons, OutTensor, Router
from ..checkpoint.base import Checkpoint
from ..checkpoint.json_files import read_json
from ..checkpoint.out_folder import RECEIPT_FILE
from ..checkpoint.paths import inside
from ..checkpoint.reader import INDEX, PICKLES, SafetensorsCheckpoint
from ..checkpoint.tensors import cast, nonfinite, torch_dtype
from ..checkpoint.writer import joined_sha256, tensor_bytes
from ..errors import CheckpointError, VerificationError
from ..lazy import torch, transformers
from ..progress import Progress, ProgressCallback
from .assembly import is_parents, make
from .plan import SplitPlan

OUTER = "outer"
"""The unit of tensors that belong to no layer: embedding, final norm and head."""


def unit_of(tensor: OutTensor) -> str:
    """Return the unit in which a tensor is written and hashed: its layer, or `OUTER`."""
    return OUTER if tensor.layer is None else f"layer.{tensor.layer}"


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of the weights as they were written (see `llamamoe.checkpoint.writer.joined_sha256`).

    Attributes:
        weights: Hash over all tensors; None if unknown.
        units: Hash over each unit; empty if unknown.
        missing: Reason why the hashes are unknown; empty otherwise.
    """

    weights: str | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""

    @classmethod
    def of_receipt(cls, folder: Path) -> Hashes:
        """Read the hashes from the receipt of a conversion.

        Raises:
            VerificationError: There is a receipt, but it cannot be read.
        """
        path = folder / RECEIPT_FILE
        if not path.is_file():
            return cls(missing=f"{RECEIPT_FILE} is missing")
        try:
            receipt = read_json(inside(folder, RECEIPT_FILE))
        except CheckpointError as error:
            raise VerificationError(
                f"{folder}: {error}", hint=f"Restore {RECEIPT_FILE} from where the folder came from, or delete it."
            ) from None
        weights, units = receipt.get("weights_sha256"), receipt.get("unit_sha256")
        if not isinstance(weights, str):
            return cls(missing=f"{RECEIPT_FILE} holds no weights_sha256: an older version wrote it")
        return cls(weights, units if isinstance(units, dict) else {})


@dataclass(frozen=True)
class WeightsChecked:
    """The outcome of `check_weights`.

    Attributes:
        copied: Number of tensors that equal the parent's, bit for bit.
        hashed: Number of tensors that equal those written, by the hash in the receipt.
        unproven: Reason why the others could not be compared; empty if all were.
    """

    copied: int
    hashed: int
    unproven: str


def check_weights(plan: SplitPlan, converted: Checkpoint, hashes: Hashes, progress: ProgressCallback) -> WeightsChecked:
    """Compare every tensor of a folder with its expected content. Reads each tensor once.

    Tensors that a conversion copies from the parent unchanged or scaled (attention, norms, embedding, head, layers left
    dense) and constant ones are made again from the parent and compared bit for bit. All tensors, experts and
    routers included, are compared with the hashes of the written ones.

    Raises:
        VerificationError: A tensor differs; the message names it, or its layer if only the hash differs.
    """
    digests: dict[str, dict[str, str]] = {}
    copied = 0
    for done, tensor in enumerate(plan.tensors, start=1):
        stored = tensor_bytes(converted.read(tensor.name).contiguous())
        if is_parents(tensor, repaired=plan.repaired):
            if stored != tensor_bytes(make(tensor, plan.model, None, plan.dtype)):
                what = "what the recipe implies" if isinstance(tensor.origin, Constant) else "the parent's, bit for bit"
                raise VerificationError(f"{tensor.name} is not {what}.", hint=_made_from(plan, converted))
            copied += 1
        if hashes.weights is not None:
            digests.setdefault(unit_of(tensor), {})[tensor.name] = hashlib.sha256(stored).hexdigest()
        progress(Progress("check weights", done, len(plan.tensors), "tensor"))
    if hashes.weights is None:
        return WeightsChecked(copied, 0, hashes.missing)
    _check_hashes(plan, converted, hashes, digests)
    return WeightsChecked(copied, len(plan.tensors), "")


def _check_hashes(
    plan: SplitPlan, converted: Checkpoint, hashes: Hashes, digests: Mapping[str, Mapping[str, str]]
) -> None:
    if joined_sha256({name: digest for unit in digests.values() for name, digest in unit.items()}) == hashes.weights:
        return
    changed = [unit for unit, found in digests.items() if hashes.units.get(unit) not in (None, joined_sha256(found))]
    where = f"experts or router of layer {changed[0].removeprefix('layer.')}" if changed else "experts or routers"
    broken = _not_finite(plan, converted)
    if broken:  # more precise than a hash of a layer
        where = f"{broken} holds NaN or infinite values"
    raise VerificationError(
        f"the weights are not those that were written ({where}): their SHA-256 differs from the one in {RECEIPT_FILE}.",
        hint=_made_from(plan, converted),
    )


def check_files(plan: SplitPlan, converted: SafetensorsCheckpoint) -> None:
    """Check files, names, dtypes and shapes of all tensors, and the configuration.

    Keys beyond the planned ones are allowed as long as transformers' configuration is the planned one.

    Raises:
        VerificationError: One of them differs from the plan.
    """
    _check_others(plan, converted)
    planned = {name: entry[:2] for tensors in plan.shards.values() for name, entry in tensors.items()}
    found = {name: (info.dtype, info.shape) for name, info in converted.tensors.items()}
    for name in sorted(planned.keys() | found.keys()):
        if planned.get(name) != found.get(name):
            raise VerificationError(
                f"{name}: the recipe implies {_described(planned.get(name))}, the file holds {_described(found.get(name))}.",
                hint=_made_from(plan, converted),
            )
    config = {k: v for k, v in read_json(converted.path / "config.json").items() if k in plan.config}
    wrong = sorted(k for k in plan.config if k not in config or config[k] != plan.config[k])
    if wrong:
        raise VerificationError(
            f"config.json: {wrong[0]} = {config.get(wrong[0])!r}, but the recipe implies {plan.config[wrong[0]]!r}.",
            hint=_made_from(plan, converted),
        )
    _check_effective(plan, converted)


def _described(entry: tuple[str, tuple[int, ...]] | None) -> str:
    """Return words for a tensor's dtype and shape."""
    return "no such tensor" if entry is None else f"{entry[0]} of shape {list(entry[1])}"


def _check_others(plan: SplitPlan, converted: SafetensorsCheckpoint) -> None:
    """Refuse files beside the planned ones that transformers might load instead."""
    known = {*plan.shards, *([INDEX] if len(plan.shards) > 1 else [])}
    for path in sorted(converted.path.iterdir()):
        weights = path.name.endswith((".safetensors", ".safetensors.index.json", *PICKLES))
        if path.name not in known and (weights or path.name == "adapter_config.json"):
            raise VerificationError(
                f"{converted.path} also holds {path.name}, which the conversion did not write and transformers may load.",
                hint="Move it away.",
            )


def _check_effective(plan: SplitPlan, converted: SafetensorsCheckpoint) -> None:
    """Compare the configuration objects, so that an added key that changes the computation is found."""
    found = {k: v for k, v in converted.config.items() if k not in ("llamamoe", "auto_map")}
    try:
        have = transformers.AutoConfig.for_model(**found).to_dict()
    except Exception as error:  # the class of every architecture has its own rules
        raise VerificationError(
            f"config.json: transformers refuses it ({error}).", hint=_made_from(plan, converted)
        ) from None
    want = transformers.AutoConfig.for_model(**plan.config).to_dict()
    wrong = sorted(k for k in want if have.get(k) != want[k] and k not in ("transformers_version", "_name_or_path"))
    if wrong:
        raise VerificationError(
            f"config.json: transformers takes {wrong[0]} = {have.get(wrong[0])!r}, but the recipe implies "
            f"{want[wrong[0]]!r}.",
            hint=_made_from(plan, converted),
        )


def _made_from(plan: SplitPlan, converted: Checkpoint) -> str:
    """Return a hint to check that the parent is the right one."""
    block = converted.config.get("llamamoe")
    parent = block.get("source") if isinstance(block, dict) else None
    return (
        f"{converted.path} was made from {parent or 'another folder'}; it was compared with "
        f"{plan.model.checkpoint.path}. If that is its parent, the weights were changed since."
    )


def neuron_keys(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor | None) -> torch.Tensor:
    """Return int64 ``[F]``, sorted: a hash of each neuron's bits, without neurons of zeros.

    Args:
        gate: ``[F, H]``.
        up: ``[F, H]``.
        down: ``[F, H]`` (columns as rows), or None to leave the down projection out.
    """
    generator = torch.Generator().manual_seed(20160)
    total = torch.zeros(gate.shape[0], dtype=torch.int64)
    for matrix in (gate, up, down):
        if matrix is None:
            continue
        factors = torch.randint(-(2**62), 2**62, (matrix.shape[1],), generator=generator) * 2 + 1
        bits = matrix.contiguous().view({2: torch.int16, 4: torch.int32}[matrix.dtype.itemsize])
        for start in range(0, len(bits), 1024):
            block = slice(start, start + 1024)
            total[block] += (bits[block].long() * factors).sum(1)
    return total[total != 0].sort().values


def check_neurons(plan: SplitPlan, converted: Checkpoint, layer: int) -> None:
    """Check that the neurons of experts and shared expert equal the parent's, bit for bit.

    If the method is exact, each must occur exactly once (upcycled: once per copy; shared ones once);
    else every stored neuron must be one of the parent's, and none may occur twice unless experts may overlap.
    The down projections are left out if repair changed them or the target's factor rounds them (see
    `Combine.bake_is_exact`). Nothing is compared if nothing is kept (`SplitPlan.kept`).

    Raises:
        VerificationError: A neuron is missing, repeated or changed.
    """
    if plan.kept == "nothing":
        return
    down = plan.kept == "neurons" and plan.layout.combine.bake_is_exact
    dtype, prefix = torch_dtype(plan.dtype), f"model.layers.{layer}.mlp."
    dense = [cast(plan.model.read(f"{prefix}{part}_proj.weight"), dtype) for part in ("gate", "up", "down")]
    want = neuron_keys(dense[0], dense[1], dense[2].T if down else None)
    routed, shared = (_stored_keys(plan, converted, layer, kind, down) for kind in ("routed", "shared"))
    splitter, copies = plan.splitter, plan.layout.copies
    if splitter.exact:
        held = torch.cat([shared.repeat(copies), routed]).sort().values
        good = torch.equal(want.repeat_interleave(copies), held)
        what = "every neuron of the parent exactly once" if copies == 1 else f"{copies} copies of the parent's neurons"
    else:
        held, counts = torch.unique_consecutive(torch.cat([shared, routed]).sort().values, return_counts=True)
        place = torch.searchsorted(want, held).clamp(max=max(len(want) - 1, 0))
        there = torch.searchsorted(want, held, right=True) - torch.searchsorted(want, held)
        good = bool((want[place] == held).all() if splitter.overlap else (counts <= there).all())
        what = "only neurons of the parent" + ("" if splitter.overlap else ", each at most once")
    if not good:
        raise VerificationError(
            f"layer {layer}: the experts do not hold {what}, bit for bit.", hint=_made_from(plan, converted)
        )


def _stored_keys(plan: SplitPlan, converted: Checkpoint, layer: int, kind: str, down: bool) -> torch.Tensor:
    """Return int64, sorted: keys of the stored neurons of all routed experts, or of the shared one."""
    gates, ups, downs = [], [], []
    for tensor in plan.tensors:
        origin = tensor.origin
        if (
            tensor.layer != layer
            or not isinstance(origin, Neurons)
            or (origin.expert == "shared") != (kind == "shared")
        ):
            continue
        value = converted.read(tensor.name)
        value = value.transpose(-1, -2) if origin.turned else value
        if origin.part == "down":
            if down:
                downs.append((value / origin.scale).transpose(-1, -2).reshape(-1, value.shape[-2]))
        elif origin.part == "gate_up":
            gate, up = value.chunk(2, dim=-2)
            gates.append(gate.reshape(-1, value.shape[-1]))
            ups.append(up.reshape(-1, value.shape[-1]))
        else:
            (gates if origin.part == "gate" else ups).append(value)
    if not gates:
        return torch.empty(0, dtype=torch.int64)
    return neuron_keys(torch.cat(gates), torch.cat(ups), torch.cat(downs) if down else None)


def check_finite(plan: SplitPlan, converted: Checkpoint) -> None:
    """Check that neurons and routers are finite.

    Raises:
        VerificationError: A tensor holds NaN or infinite values.
    """
    broken = _not_finite(plan, converted)
    if broken:
        raise VerificationError(
            f"{broken} holds NaN or infinite values, although the parent computes finite ones.",
            hint=_made_from(plan, converted),
        )


def _not_finite(plan: SplitPlan, converted: Checkpoint) -> str | None:
    """Return the first of the neurons and routers that holds NaN or infinite values."""
    made = (tensor.name for tensor in plan.tensors if isinstance(tensor.origin, Neurons | Heads | Router))
    return next((name for name in made if nonfinite(converted.read(name))), None)
