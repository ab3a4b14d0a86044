"""What `heal` is to do: two checkpoints, a recipe, and what follows from them in names, sizes and costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.expert_weighting import renormalising
from ..architectures.sources.base import layer_shapes, number, positive
from ..architectures.targets.base import Target
from ..calibration.compute import MEMORY_BYTES, REFERENCE_FLOPS
from ..checkpoint.layout import Shards
from ..checkpoint.locate import Location
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.writer import QUEUE_BYTES

if TYPE_CHECKING:
    from .recipe import HealRecipe

FROZEN = ("e_score_correction_bias", "shared_expert_gate")
"""Parts of names of parameters that are left alone: a bias of the selection, and a gate that is fixed at one half."""
ROUTER = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router\.layer)\.weight$")
_FFN = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe|shared_mlp)\.")


@dataclass(frozen=True)
class HealPlan:
    """A converted checkpoint, the dense one that it was made from, and how the one is brought near the other.

    Attributes:
        model: Where the converted checkpoint is.
        checkpoint: It, opened.
        parent: Where the dense one is.
        dense: It, understood.
        target: The converted one's architecture.
        recipe: How to train.
        layers: The layers that have experts, ascending.
        length: Tokens of a sequence.
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
        """The router's tensor in the files."""
        return next(n for n in self.checkpoint.tensors if (found := ROUTER.match(n)) and int(found[1]) == layer)

    def trained_names(self, layer: int) -> list[str]:
        """The tensors of a converted layer that are written anew."""
        kept = (*FROZEN, self.router_name(layer)) if self.recipe.router == "frozen" else FROZEN
        return [name for name in self.layer_names(layer) if _FFN.match(name) and not any(part in name for part in kept)]

    def layer_names(self, layer: int) -> list[str]:
        """All tensors of a layer, in the order of the files."""
        return [name for name in self.checkpoint.tensors if name.startswith(f"model.layers.{layer}.")]

    def outer_names(self) -> list[str]:
        """The tensors that belong to no layer."""
        return [name for name in self.checkpoint.tensors if not name.startswith("model.layers.")]

    def shards(self) -> Shards:
        """The files to write: those of the converted checkpoint, tensor for tensor."""
        found: Shards = {}
        for name, info in self.checkpoint.tensors.items():
            found.setdefault(info.file.name, {})[name] = (info.dtype, info.shape, info.nbytes)
        return found

    # ---- costs ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    @property
    def trained_parameters(self) -> int:
        """Of one converted layer."""
        return sum(self.checkpoint.tensors[name].numel for name in self.trained_names(self.layers[0]))

    @property
    def active_parameters(self) -> int:
        """Of these, those that one token uses."""
        routed = sum(
            self.checkpoint.tensors[name].numel
            for name in self.trained_names(self.layers[0])
            if ".experts." in name or ".block_sparse_moe.input_linear" in name or "sparse_moe.output_linear" in name
        )
        return self.trained_parameters - routed + routed * self.top_k // self.num_experts

    @property
    def held_out_tokens(self) -> int:
        """Of the most tokens of text: whole sequences, at least one."""
        return self.held_out_of(self.recipe.tokens // self.length) * self.length

    def held_out_of(self, sequences: int) -> int:
        """How many of so many sequences are held out."""
        return min(max(1, round(sequences * self.recipe.held_out)), sequences - 1)

    @property
    def steps(self) -> int:
        """Optimiser steps of one layer, at most."""
        tokens = self.recipe.tokens // self.length * self.length - self.held_out_tokens
        return (self.recipe.epochs + self.recipe.competitive_epochs) * max(1, tokens // self.recipe.batch)

    @property
    def state_bytes(self) -> int:
        """Of the hidden states: two residual streams in float32."""
        return 2 * 4 * self.recipe.tokens * self.dense.spec.hidden_size

    @property
    def states_in_files(self) -> bool:
        """Whether hidden states, inputs and aims lie in memory-mapped files."""
        return self.state_bytes > MEMORY_BYTES

    @property
    def peak_bytes(self) -> int:
        """Estimate of the memory that one process needs at most, beyond torch itself."""
        spec, cached = self.dense.spec, 2 * self.state_bytes
        weights = (
            4 * 6 * self.trained_parameters
        )  # float32: weights, gradients, two moments, loading, the dtype of products
        return QUEUE_BYTES + weights + 4 * spec.vocab_size * spec.hidden_size + (0 if self.states_in_files else cached)

    @property
    def flops(self) -> int:
        """Floating-point operations of everything: the parent's walk, and training all layers."""
        shapes = layer_shapes(self.dense.spec)
        walk = 2 * sum(math.prod(shape) for shape in shapes.values()) * 2  # the FFN runs again for its outputs
        train = 6 * self.active_parameters * (self.recipe.epochs + self.recipe.competitive_epochs)
        return self.recipe.tokens * (walk * self.num_layers + train * len(self.layers))

    @property
    def seconds(self) -> float:
        """Estimate of the time of one process on two laptop cores in float32."""
        return self.flops / REFERENCE_FLOPS

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
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
    """Configuration keys that change: a router whose weights are made to sum to one."""
    config = plan.checkpoint.config
    if not renormalised:
        return {}
    found: dict[str, Any] = {"norm_topk_prob": True}
    if plan.target.scaling_knob:
        found["routed_scaling_factor"] = number(config, "routed_scaling_factor", 1.0) * 0.5 * plan.top_k
    return found


def factors_of(plan: HealPlan, *, renormalised: bool) -> dict[str, float]:
    """What that change multiplies, for `llamamoe.architectures.expert_weighting.rescaled_block`."""
    if not renormalised:
        return {}
    return renormalising(sigmoid=plan.target.scaling_knob, num_experts=plan.num_experts, top_k=plan.top_k)
