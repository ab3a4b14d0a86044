"""Read a converted checkpoint of any target: the tensors around its FFNs, and the neurons in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint.reader import SafetensorsCheckpoint
from ..errors import CheckpointError, RefusedError
from ..lazy import torch
from .expert_weighting import Mixing, complete_config, mixing_of, rescale_of
from .inspect import inspect
from .moe_layout import Combine, Copy, CorrectionBias, Heads, MoeLayout, Neurons, OutTensor, Router, Stack
from .rescales import RESCALES
from .sources.base import DenseSpec
from .stored_experts import Experts
from .targets.base import Target


@dataclass(frozen=True)
class FfnParts:
    """The neurons of one FFN, shared ones first, then expert by expert, in the units of a dense FFN.

    Attributes:
        gate_PH: ``[P, H]``, as stored.
        up_PH: ``[P, H]``, as stored.
        down_HP: ``[H, P]``, with the architecture's factor of outputs divided out; as stored where that is 1.
    """

    gate_PH: torch.Tensor
    up_PH: torch.Tensor
    down_HP: torch.Tensor


class ConvertedModel:
    """A checkpoint of one of the targets, opened: headers are known, no tensor is in memory.

    Args:
        checkpoint: The folder.
        rescale: The rescale in effect (see `llamamoe.architectures.rescales`); None takes the one that the conversion
            recorded.

    Raises:
        RefusedError: It is not a mixture of experts of a known architecture.
        CheckpointError: Files and configuration disagree.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, rescale: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.block: dict[str, Any] = dict(checkpoint.config.get("llamamoe") or {})
        self.mixing: Mixing = mixing_of(checkpoint.config)
        self._rescale = rescale_of(checkpoint.config, rescale)

    @property
    def rescale(self) -> str:
        """Name of the rescale in effect.

        Raises:
            RefusedError: The rescale is neither recorded nor given.
        """
        if self._rescale is None:
            raise RefusedError(
                f"{self.checkpoint.path} does not record how selected experts are weighted: it was not converted by "
                "llamamoe.",
                hint="Name the rescale it was made with, if you know it: see llamamoe methods.",
            )
        return self._rescale

    @cached_property
    def experts(self) -> Experts:
        """Sizes of the experts, read from the files."""
        found = inspect(self.checkpoint.path).experts
        if found is None:
            raise CheckpointError(
                f"{self.checkpoint.path}: config.json is that of a mixture of experts, but the files hold no experts."
            )
        return found

    @property
    def target(self) -> Target:
        """The architecture of the checkpoint."""
        return self.mixing.target

    @cached_property
    def spec(self) -> DenseSpec:
        """The model around the FFNs; ``intermediate_size`` holds for layers that stayed dense."""
        spec = self.target.dense_spec(complete_config(self.checkpoint.config))
        if self.experts.dense_width:
            spec = replace(spec, intermediate_size=self.experts.dense_width)
        return replace(spec, tie_word_embeddings="lm_head.weight" not in self.checkpoint.tensors)

    @property
    def routed_factor(self) -> float:
        """The factor that turns a stored down projection of a routed expert into that of a dense FFN.

        With ``c`` the coefficient of the rescale a selected expert counts c times what it gave in the dense FFN; as
        stored it counts the router's mean weight times the stored one.
        """
        mixing = self.mixing
        c = RESCALES.get(self.rescale)().coefficient(mixing.num_experts, mixing.top_k)
        factor = mixing.mean_weight / c
        return 1.0 if abs(factor - 1.0) < 1e-12 else factor

    @property
    def residual_scale(self) -> float:
        """The factor of the residual stream that the conversion recorded (see `Target.residual_scale`)."""
        factor, baked = (self.block.get(key) for key in ("factor", "baked_factor"))
        return baked / factor if self.target.attention_experts and factor and baked else 1.0

    @cached_property
    def layout(self) -> MoeLayout:
        """The sizes in the form that targets take."""
        sizes, mixing = self.experts, self.mixing
        combine = Combine(mixing.weighting, mixing.factor, bake=1.0, any_k=False, parity_factor=1.0)
        return MoeLayout(
            num_experts=sizes.num_experts,
            top_k=mixing.top_k,
            expert_width=sizes.expert_width,
            num_shared=sizes.shared_width,
            shared_width=sizes.shared_width,
            dense_layers=sizes.dense_layers,
            combine=combine,
        )

    # ---- around the FFNs ------------------------------------------------------------------------------------------

    @cached_property
    def _outer(self) -> dict[str, OutTensor]:
        """The stored tensor of each canonical one outside the FFNs."""
        found: dict[str, OutTensor] = {}
        for tensor in self.target.tensors(self.spec, self.layout):
            origin = tensor.origin
            if isinstance(origin, Copy | Heads | Stack):
                for name in origin.names if isinstance(origin, Stack) else (origin.name,):
                    found.setdefault(name, tensor)
        return found

    def has(self, name: str) -> bool:
        """Return whether there is a canonical tensor of this name outside the MoE layers' FFNs."""
        return name in self._outer

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a canonical tensor outside the FFNs, as stored."""
        return self.checkpoint.tensors[self._outer[name].name].shape

    def read(self, name: str) -> torch.Tensor:
        """Return a canonical tensor outside the MoE layers' FFNs, as stored, with rotary rows in Llama's order.

        Experts of attention are joined to its query heads, their output in the units of a dense attention.
        """
        from ..checkpoint.tensors import cast, to_halves

        tensor = self._outer[name]
        origin = tensor.origin
        value = self.checkpoint.read(tensor.name)
        if isinstance(origin, Heads):
            factor = self.routed_factor if origin.part == "output" else 1.0
            return cast(joined_heads(value, origin), value.dtype, factor)
        if isinstance(origin, Stack):
            return value.chunk(len(origin.names))[origin.names.index(name)]
        assert isinstance(origin, Copy)
        return to_halves(value, origin.interleave) if origin.interleave else value

    def dtype_of(self, name: str) -> str:
        """Return the stored dtype (safetensors name) of a canonical tensor outside the FFNs."""
        return self.checkpoint.tensors[self._outer[name].name].dtype

    # ---- the FFNs -------------------------------------------------------------------------------------------------

    def ffn(self, layer: int) -> FfnParts:
        """Return the neurons of one layer, padding included. Holds the layer's FFN in memory."""
        if layer in self.experts.dense_layers:
            parts = [self.read(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")]
            return FfnParts(*parts)
        shared, routed = (self._parts(layer, shared, self.routed_factor) for shared in (True, False))
        pieces = {part: shared[part] + routed[part] for part in routed}
        return FfnParts(torch.cat(pieces["gate"]), torch.cat(pieces["up"]), torch.cat(pieces["down"], dim=1))

    def routed(self, layer: int) -> FfnParts:
        """Return the neurons of one layer's routed experts as stored, expert by expert. Holds them in memory."""
        pieces = self._parts(layer, False, 1.0)
        return FfnParts(torch.cat(pieces["gate"]), torch.cat(pieces["up"]), torch.cat(pieces["down"], dim=1))

    def router(self, layer: int) -> torch.Tensor:
        """Return the router's rows of one layer, ``[N, H]``."""
        tensors = self.target.moe_tensors(self.spec, self.layout, layer)
        return self.checkpoint.read(next(tensor.name for tensor in tensors if isinstance(tensor.origin, Router)))

    def correction_bias(self, layer: int) -> torch.Tensor | None:
        """Return the bias of one layer's router, float32 ``[N]``; None if it has none, or zeros."""
        tensors = self.target.moe_tensors(self.spec, self.layout, layer)
        name = next((tensor.name for tensor in tensors if isinstance(tensor.origin, CorrectionBias)), None)
        bias_N = None if name is None else self.checkpoint.read(name).float().flatten()
        return bias_N if bias_N is not None and bool(bias_N.any()) else None

    def _parts(self, layer: int, shared: bool, factor: float) -> dict[str, list[torch.Tensor]]:
        """Return rows of gate and up, and columns of down, of the shared expert or the routed ones; these times ``factor``."""
        pieces: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
        for tensor in self.target.moe_tensors(self.spec, self.layout, layer):
            origin = tensor.origin
            if isinstance(origin, Neurons) and (origin.expert == "shared") == shared:
                for part, value in self._neurons(tensor.name, origin, factor):
                    pieces[part].append(value)
        return pieces

    def _neurons(self, name: str, origin: Neurons, routed_factor: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a stored tensor as rows of gate and up, or columns of down."""
        from ..checkpoint.tensors import cast

        value = self.checkpoint.read(name)
        if origin.part == "gate_up":
            gate, up = value.chunk(2, dim=-2)
            yield "gate", gate.flatten(0, -2)
            yield "up", up.flatten(0, -2)
        elif origin.part != "down":
            yield origin.part, value
        else:
            factor = 1.0 / origin.scale if origin.expert == "shared" else routed_factor
            wide = torch.cat(list(value), dim=1) if value.dim() == 3 else value
            yield "down", cast(wide, wide.dtype, factor)


def joined_heads(value: torch.Tensor, origin: Heads) -> torch.Tensor:
    """Return ``[N, G D, H]`` as ``q_proj [G N D, H]``, or ``[N, H, G D]`` as ``o_proj [H, G N D]`` (see `Heads`)."""
    if origin.part == "query":
        return value.reshape(origin.experts, origin.groups, -1, value.shape[2]).transpose(0, 1).flatten(0, 2)
    return value.reshape(origin.experts, len(value[0]), origin.groups, -1).permute(1, 2, 0, 3).flatten(1)


def check_shapes(model: ConvertedModel) -> None:
    """Check that the files hold what the configuration implies and no more. Reads headers only.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or does not belong to the architecture.
    """
    expected = list(model.target.tensors(model.spec, model.layout))
    unknown = sorted(model.checkpoint.tensors.keys() - {tensor.name for tensor in expected})
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors of {model.checkpoint.path} are unknown, the first is {unknown[0]!r}: dropping them "
            "would not be exact."
        )
    for tensor in expected:
        info = model.checkpoint.tensors.get(tensor.name)
        if info is None:
            raise CheckpointError(f"{model.checkpoint.path} lacks {tensor.name}, which config.json implies.")
        if info.shape != tensor.shape:
            raise CheckpointError(
                f"{tensor.name} has shape {list(info.shape)}, but config.json implies {list(tensor.shape)}."
            )
