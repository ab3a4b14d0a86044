"""Find routers and experts of a native model of transformers, whatever its architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..architectures.expert_weighting import refuse_attention_experts
from ..architectures.moe_layout import RouterWeighting
from ..architectures.targets import TARGETS
from ..architectures.targets.base import Target
from ..errors import CheckpointError
from ..lazy import torch

CORRECTION_BIAS = "e_score_correction_bias"
"""Names of a selection bias, as an attribute and at the end of its name in a checkpoint: glm4_moe, ernie4_5_moe."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class ExpertWeights(NamedTuple):
    """The weights of a layer's routed experts, with what adapters add, and with their gradient.

    Attributes:
        gate_up_N2WH: Gate rows, then up rows, of each expert.
        down_NHW: Down projections.
        activation: The activation function of the gate.
    """

    gate_up_N2WH: torch.Tensor
    down_NHW: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer of a live model.

    Attributes:
        layer: Index of the decoder layer.
        name: Dotted name of ``block`` in the model.
        block: The module that holds router and experts (and shared neurons, if the architecture puts them there).
        router: The native router: ``weight`` is ``[N, H]``, its output ``(logits_TN, weights_Tk, indices_Tk)``.
        num_experts: N.
        top_k: k.
        weighting: Normalisation of the router's logits.
        factor: The router's factor of the weights.
    """

    layer: int
    name: str
    block: torch.nn.Module
    router: torch.nn.Module
    num_experts: int
    top_k: int
    weighting: RouterWeighting
    factor: float

    @property
    def experts(self) -> torch.nn.Module:
        """The routed experts: ``gate_up_proj`` is ``[N, 2W, H]``, ``down_proj`` ``[N, H, W]``."""
        experts: torch.nn.Module = self.block.experts  # type: ignore[assignment]
        return experts

    def expert_weights(self) -> ExpertWeights:
        """Return the routed experts' weights as they are computed with; they must be unsharded."""
        weights: dict[str, torch.Tensor] = {}
        module: Any = self.experts
        while hasattr(module, "get_delta_weight"):  # peft wraps the module once for each parameter that it adapts
            deltas = [module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A]
            weights[module.parameter_name] = sum(deltas, start=module.get_param())
            module = module.base_layer
        gate_up, down = (weights.get(name, getattr(module, name)) for name in ("gate_up_proj", "down_proj"))
        return ExpertWeights(gate_up, down, module.act_fn)

    @property
    def router_NH(self) -> torch.nn.Parameter:
        """The router's rows; in hunyuan_v1_moe they are a module of their own."""
        rows: Any = getattr(self.router, "wg", self.router)
        return rows.weight  # type: ignore[no-any-return]

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """The bias added to the scores for the selection only (glm4_moe ``[N]``, ernie4_5_moe ``[1, N]``), or None."""
        found: torch.Tensor | None = getattr(self.router, CORRECTION_BIAS, None)
        if found is None:
            found = getattr(getattr(self.router, "moe_statics", None), CORRECTION_BIAS, None)
        return found


def find_moe_layers(model: torch.nn.Module) -> list[MoeLayer]:
    """Return all mixture-of-experts layers in order of depth, by the router class that the model's class declares.

    Args:
        model: A native model of transformers (wrapped by DDP, FSDP or peft, or not).

    Raises:
        CheckpointError: There are none, or a router is not supported.
        RefusedError: Attention is routed, too.
    """
    config: Any = getattr(_base(model), "config", None)
    model_type = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "model_type", "")
    refuse_attention_experts(model_type, "training")
    router_class = _router_class(model)
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if router_class is not None and isinstance(module, router_class):
            parent, _, _ = name.rpartition(".")
            index = _LAYER.search(name)
            if index is None:
                raise CheckpointError(f"the router {name!r} belongs to no decoder layer.")
            found.append(_moe_layer(int(index[1]), parent, modules[parent], module, model_type))
    if not found:
        raise CheckpointError(
            f"{_base(model).__class__.__name__} has no router: it is not a mixture of experts.",
            hint="Convert it first: llamamoe split SOURCE OUT.",
        )
    return sorted(found, key=lambda each: each.layer)


def _base(model: torch.nn.Module) -> Any:
    """Return the transformers model inside wrappers."""
    for module in model.modules():
        if hasattr(module, "_can_record_outputs") and hasattr(module, "config"):
            return module
    return model


def _router_class(model: torch.nn.Module) -> type[torch.nn.Module] | None:
    for module in model.modules():
        recorded: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorded is not None:
            found: type[torch.nn.Module] = getattr(recorded, "target_class", recorded)
            return found
    return None


def _moe_layer(index: int, name: str, block: torch.nn.Module, router: Any, model_type: str) -> MoeLayer:
    if model_type not in TARGETS or not hasattr(block, "experts"):
        raise CheckpointError(
            f"{type(router).__name__}: how this router weighs its experts is not known here.",
            hint=f"Known are the routers of {', '.join(each.name for each in TARGETS if each.routed)}.",
        )
    weighting = _weighting(TARGETS.get(model_type), router)
    factor = float(getattr(router, "routed_scaling_factor", 1.0))
    return MoeLayer(index, name, block, router, int(router.num_experts), int(router.top_k), weighting, factor)


def _weighting(target: type[Target], router: Any) -> RouterWeighting:
    """Return this router's weighting: the target's only one, or the one that its flag selects (see `mixing_of`)."""
    first = len(target.weightings) == 1 or router.norm_topk_prob
    return target.router_weighting(target.weightings[0 if first else 1])
