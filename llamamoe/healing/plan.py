"""Plan `heal` from two checkpoints and a recipe: names, sizes and costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..architectures.costs import role_of
from ..architectures.dense_checkpoint import DenseModel, understand
from ..architectures.expert_weighting import is_router, renormalising
from ..architectures.sources.base import layer_shapes, number, positive
from ..architectures.targets.base import Target
from ..calibration.compute import MAX_LENGTH, MEMORY_BYTES, REFERENCE_FLOPS
from ..checkpoint.locate import Location, locate, locate_folder, open_parent
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.writer import QUEUE_BYTES
from ..data.files import find_files
from ..errors import UsageError
from ..methods.routers import ROUTERS
from ..models.devices import check_device
from ..models.loadable import check_counts
from .preflight import check_dtypes, check_fit, check_inputs, healed_target
from .recipe import HealRecipe

FROZEN = ("e_score_correction_bias", "shared_expert_gate", "mlp.bias")
"""Parts of names of parameters that are not trained: a bias of the selection, a gate fixed at one half, a bias of zeros."""
_FFN = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe|shared_mlp)\.")


@dataclass(frozen=True)
class HealPlan:
    """The plan of healing a converted checkpoint with the dense one that it was made from.

    Attributes:
        model: Location of the converted checkpoint.
        checkpoint: The opened converted checkpoint.
        parent: Location of the dense checkpoint.
        dense: The dense model.
        target: The converted one's architecture.
        recipe: Training settings.
        layers: The layers that have experts, ascending.
        length: Tokens per sequence.
        warnings: Sentences for the user.
    """

    model: Location
    checkpoint: SafetensorsCheckpoint
    parent: Location
    dense: DenseModel
    target: Target
    recipe: HealRecipe
    layers: tuple[int, ...]
    length: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        """Decoder layers, converted or not."""
        return self.dense.spec.num_layers

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return self.checkpoint.tensors[self.router_name(self.layers[0])].shape[0]

    @property
    def top_k(self) -> int:
        """Experts selected per token."""
        return positive(self.checkpoint.config, self.target.top_k_key)

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of most weights."""
        sizes: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
        return max(sizes, key=sizes.__getitem__)

    def router_name(self, layer: int) -> str:
        """Return the name of the router's tensor in the files."""
        return next(name for name in self.checkpoint.tensors if _router_layer(name) == layer)

    def trained_names(self, layer: int) -> list[str]:
        """Return the names of a converted layer's tensors that are rewritten."""
        kept = (*FROZEN, self.router_name(layer)) if self.recipe.router == "frozen" else FROZEN
        return [name for name in self.layer_names(layer) if _FFN.match(name) and not any(part in name for part in kept)]

    def layer_names(self, layer: int) -> list[str]:
        """Return the names of all tensors of a layer, in the order of the files."""
        return [name for name in self.checkpoint.tensors if name.startswith(f"model.layers.{layer}.")]

    def outer_names(self) -> list[str]:
        """Return the names of the tensors that belong to no layer."""
        return [name for name in self.checkpoint.tensors if not name.startswith("model.layers.")]

    # ---- costs ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    @property
    def trained_parameters(self) -> int:
        """Trained parameters of one converted layer."""
        return sum(self.checkpoint.tensors[name].numel for name in self.trained_names(self.layers[0]))

    @property
    def active_parameters(self) -> int:
        """Trained parameters of one converted layer that one token uses."""
        routed = sum(
            self.checkpoint.tensors[name].numel
            for name in self.trained_names(self.layers[0])
            if role_of(name) == "routed"
        )
        return self.trained_parameters - routed + routed * self.top_k // self.num_experts

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens of the maximum amount of text: whole sequences, at least one."""
        return self.held_out_of(self.recipe.tokens // self.length) * self.length

    def held_out_of(self, sequences: int) -> int:
        """Return how many of a number of sequences are held out."""
        return min(max(1, round(sequences * self.recipe.held_out)), sequences - 1)

    @property
    def steps(self) -> int:
        """Maximum number of optimiser steps of one layer."""
        tokens = self.recipe.tokens // self.length * self.length - self.held_out_tokens
        return (self.recipe.epochs + self.recipe.competitive_epochs) * max(1, tokens // self.recipe.batch)

    @property
    def state_bytes(self) -> int:
        """Size of the hidden states: two residual streams in float32."""
        return 2 * 4 * self.recipe.tokens * self.dense.spec.hidden_size

    @property
    def states_in_files(self) -> bool:
        """True if hidden states, inputs and targets are in memory-mapped files."""
        return self.state_bytes > MEMORY_BYTES

    @property
    def peak_bytes(self) -> int:
        """Estimate of the peak memory of one process, beyond torch itself."""
        spec, cached = self.dense.spec, 2 * self.state_bytes
        weights = (
            4 * 6 * self.trained_parameters
        )  # float32: weights, gradients, two moments, loading, the dtype of products
        return QUEUE_BYTES + weights + 4 * spec.vocab_size * spec.hidden_size + (0 if self.states_in_files else cached)

    @property
    def flops(self) -> int:
        """Floating-point operations of the parent's walk and the training of all layers."""
        spec = self.dense.spec
        shapes = [shape for layer in range(self.num_layers) for shape in layer_shapes(spec, layer).values()]
        walk = 2 * sum(map(math.prod, shapes)) * 2  # the FFN runs again for its outputs
        train = 6 * self.active_parameters * self.recipe.epochs
        train += 2 * self.trained_parameters * self.recipe.competitive_epochs  # all experts run, only the router learns
        return self.recipe.tokens * (walk + train * len(self.layers))

    @property
    def seconds(self) -> float:
        """Estimate of the time of one process on two laptop cores in float32."""
        return self.flops / REFERENCE_FLOPS

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return {
            "model": self.model.name,
            "parent": self.parent.name,
            "architecture": self.target.architecture,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.recipe.tokens,
            "held_out_tokens": self.held_out_tokens,
            "sequence_length": self.length,
            "steps_per_layer": self.steps,
            "trained_parameters_per_layer": self.trained_parameters,
            "bytes": self.nbytes,
            "hidden_state_bytes": self.state_bytes,
            "hidden_states_in": "memory-mapped" if self.states_in_files else "memory",
            "peak_bytes": self.peak_bytes,
            "flops": self.flops,
            "seconds_at_reference": round(self.seconds, 1),
            "warnings": list(self.warnings),
            "recipe": self.recipe.model_dump(mode="json", exclude={"device"}),
        }


def config_of(plan: HealPlan, *, renormalised: bool) -> dict[str, Any]:
    """Return the configuration keys that change if a router's weights are made to sum to one."""
    config = plan.checkpoint.config
    if not renormalised:
        return {}
    found: dict[str, Any] = {"norm_topk_prob": True}
    if plan.target.scaling_knob:
        found["routed_scaling_factor"] = number(config, "routed_scaling_factor", 1.0) * 0.5 * plan.top_k
    return found


def factors_of(plan: HealPlan, *, renormalised: bool) -> dict[str, float]:
    """Return the factors of that change, for `llamamoe.architectures.expert_weighting.rescaled_block`."""
    if not renormalised:
        return {}
    return renormalising(sigmoid=plan.target.scaling_knob, num_experts=plan.num_experts, top_k=plan.top_k)


def _router_layer(name: str) -> int | None:
    """Return the layer of an FFN's router; None for any other tensor."""
    found = _FFN.match(name)
    return int(found[1]) if found and is_router(name) else None


def plan_heal(model: str | Path, parent: str | Path, recipe: HealRecipe) -> HealPlan:
    """Return the plan of `heal`, reading headers only and writing nothing. For the arguments see `llamamoe.heal`.

    Raises:
        RefusedError: A checkpoint is unsuitable, or they do not belong together; the message names every reason.
        UsageError: The text does not exist, or the recipe does not suit the models.
    """
    place, origin = locate_folder(model), locate(parent)
    checkpoint = SafetensorsCheckpoint(place.path)
    target = healed_target(checkpoint)
    check_counts(checkpoint.config, checkpoint.tensors)
    dense = understand(open_parent(origin.path, place.path))
    layers = tuple(sorted(n for name in checkpoint.tensors if (n := _router_layer(name)) is not None))
    check_fit(checkpoint, dense, target, layers)
    check_inputs(recipe, target)
    find_files(recipe.text)
    check_device(recipe.device)
    recipe = recipe.model_copy(update={"router": _router(recipe, checkpoint)})
    length = _length(recipe, dense)
    plan = HealPlan(place, checkpoint, origin, dense, target, recipe, layers, length)
    check_dtypes(checkpoint, plan.trained_names(layers[0]))
    return replace(plan, warnings=tuple(_warnings(plan)))


def _router(recipe: HealRecipe, checkpoint: SafetensorsCheckpoint) -> str:
    """Resolve ``auto``: a router fitted on text already selects well, and training it by gradient makes it worse.

    Random and unknown routers must learn everything, and soft ones were already trained.
    """
    if recipe.router != "auto":
        return recipe.router
    block = checkpoint.config.get("llamamoe")
    block = block if isinstance(block, dict) else {}
    name = str(block.get("router"))
    fitted = name in ROUTERS and ROUTERS.get(name).needs == "activations" and block.get("router_scale") == "hard"
    return "frozen" if fitted and not recipe.losses and not recipe.competitive_epochs else "trained"


def _length(recipe: HealRecipe, dense: DenseModel) -> int:
    positions = dense.spec.max_position_embeddings
    if recipe.length is not None and recipe.length > positions:
        raise UsageError(f"length is {recipe.length}, but the parent has only {positions} positions.")
    return min(recipe.length or min(MAX_LENGTH, positions), recipe.tokens // 2)


def _warnings(plan: HealPlan) -> Iterator[str]:
    if plan.target.attention_experts:
        yield "attention is routed, too, and stays as it is: only FFNs are healed (llamamoe pretrain trains both)"
    if plan.recipe.tokens < 16 * plan.recipe.batch:
        yield f"{plan.recipe.tokens} tokens give {plan.steps} steps per layer: use more --tokens, more epochs or a smaller batch"
