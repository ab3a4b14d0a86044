"""Verify a mix: each expert, selected alone, computes BASE with the FFNs of its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...architectures.dense_checkpoint import DenseModel, refuse_foreign
from ...architectures.moe_layout import Neurons, OutTensor, Router
from ...checkpoint.reader import SafetensorsCheckpoint
from ...conversion.plan import SplitPlan, plan_split
from ...conversion.reference import same_bits
from ...conversion.verify import check_all_neurons, compared
from ...conversion.verify_files import Hashes, check_files, check_weights
from ...lazy import torch
from ...progress import Progress, ProgressCallback
from .checkpoints import JoinedCheckpoint
from .plan import MixPlan, layout_recipe

_COPIES = 2
"""A mixture has two experts at least: the model of one expert is run as this many copies, of which one is selected."""


class OneExpert(SafetensorsCheckpoint):
    """A written mix as a smaller one, all of whose experts are one of its experts.

    Args:
        folder: The mix.
        plan: The plan of the smaller mixture.
        expert: The expert.
    """

    def __init__(self, folder: Path, plan: SplitPlan, expert: int) -> None:
        super().__init__(folder)
        self._whole, self._expert = SafetensorsCheckpoint(folder), expert
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self.tensors = {name: replace(self.tensors[name], shape=tensor.shape) for name, tensor in self._planned.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the tensor with the expert of this model in the place of any."""
        assert rows is None
        tensor = self._planned[name]
        value = self._whole.read(self._source(tensor))
        stacked = isinstance(tensor.origin, Router) or (
            isinstance(tensor.origin, Neurons) and tensor.origin.expert == "all"
        )
        for axis, (stored, wanted) in enumerate(zip(value.shape, tensor.shape, strict=True)):
            if stored != wanted or (stacked and axis == 0):  # a place for each expert
                value = value.index_select(axis, torch.full((wanted,), self._expert))
        return value

    def _source(self, tensor: OutTensor) -> str:
        origin = tensor.origin
        if not isinstance(origin, Neurons) or not isinstance(origin.expert, int):
            return tensor.name
        return tensor.name.replace(f".experts.{origin.expert}.", f".experts.{self._expert}.")


def verify_mix(plan: MixPlan, folder: Path, hashes: Hashes, progress: ProgressCallback) -> dict[str, Any]:
    """Check files and weights, and run each expert alone beside the dense model that it should compute.

    Returns:
        The outcome as JSON-compatible data: for each expert what `llamamoe.verify` reports of a conversion, and whether
        the dense model is the expert's own, because all but its FFNs equals BASE's.

    Raises:
        VerificationError: A check failed; the message names the difference.
    """
    converted = SafetensorsCheckpoint(folder)
    refuse_foreign(converted)
    check_files(plan.layout, converted)
    weights = check_weights(plan.layout, converted, hashes, progress)
    found = []
    small = layout_recipe(plan.recipe, _COPIES, 1)
    for index, model in enumerate(plan.experts):

        def report(step: Progress, index: int = index) -> None:
            progress(replace(step, stage=f"expert {index}: {step.stage}"))

        rest = plan.layout.model
        own = _same_rest(rest, model)
        alone = model if own else replace(plan.base, checkpoint=JoinedCheckpoint(rest.checkpoint, model.checkpoint))
        view = plan_split(alone, small)
        one = OneExpert(folder, view, index)
        neurons = check_all_neurons(view, one, report)
        outcome = compared(view, one, neurons, weights, report).to_json()
        outcome["reference"] = (
            outcome["reference"] if own else f"{plan.rest} with the FFNs of {plan.places[index + 1].name}"
        )
        found.append({"expert": index, "model": plan.places[index + 1].name, "is_the_model": own} | outcome)
    return {"passed": all(each["passed"] for each in found), "experts": found}


def _same_rest(base: DenseModel, model: DenseModel) -> bool:
    """Return whether all but the FFNs of two models is equal, bit for bit."""
    one, other = base.checkpoint, model.checkpoint
    names = [name for name in one.tensors if ".mlp." not in name]
    if any(name not in other.tensors or one.tensors[name].dtype != other.tensors[name].dtype for name in names):
        return False
    return base.spec == model.spec and all(same_bits(one.read(name), other.read(name)) for name in names)
