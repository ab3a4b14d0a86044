"""Find routers and experts of a native model of transformers, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..architectures.expert_weighting import refuse_unsupported, routes_attention
from ..architectures.moe_layout import RouterWeighting
from ..architectures.targets import TARGETS
from ..architectures.targets.base import Target
from ..checkpoint.tensor_names import layer_of
from ..checkpoint.whole_pairs import causal_type
from ..errors import CheckpointError
from ..lazy import torch

CORRECTION_BIAS = "e_score_correction_bias"
"""Names of a selection bias, as an attribute and at the end of its name in a checkpoint: glm4_moe, ernie4_5_moe."""
Decisions = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""A router's decisions: logits ``[T, N]``, weights ``[T, k]``, experts int64 ``[T, k]``."""


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
        part: The part of the decoder layer that it is.
    """

    layer: int
    name: str
    block: torch.nn.Module
    router: torch.nn.Module
    num_experts: int
    top_k: int
    weighting: RouterWeighting
    factor: float
    part: Literal["attention", "ffn"] = "ffn"

    @property
    def place(self) -> tuple[int, str]:
        """Layer and part, which sort in the order of the forward pass; unique in a model."""
        return self.layer, self.part

    @property
    def key(self) -> str:
        """The place as a string without dots: the layer's index, for attention with its part."""
        return str(self.layer) if self.part == "ffn" else f"{self.layer}-{self.part}"

    def decisions(self, output: tuple[Any, ...]) -> Decisions:
        """Return the decisions in the output of the native router."""
        return output[:3]

    def native_output(self, decisions: Decisions) -> tuple[Any, ...]:
        """Return the output of the native router for decisions: the inverse of `decisions`."""
        return decisions

    def routed_outputs(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the joint output ``[T, H]`` of an FFN's routed experts."""
        _, weights_Tk, indices_Tk = self.decisions(self.router(x_TH))
        routed: torch.Tensor = self.experts(x_TH, indices_Tk, weights_Tk)
        return routed

    @property
    def num_routed(self) -> int:
        """Number of parameters of all routed experts."""
        return sum(p.numel() for p in self.experts.parameters())

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


class JetMoeLayer(MoeLayer):
    """Attention or FFN of a layer of JetMoE, whose experts are two modules and whose routers sort their assignments.

    Their output is the order of the ``T k`` assignments by expert, the token and the weight of each in that order, the
    number of each expert's, and the logits.
    """

    def decisions(self, output: tuple[Any, ...]) -> Decisions:
        """See `MoeLayer.decisions`."""
        order_M, _, gates_M, sizes, logits_TN = output
        sorted_M = torch.arange(len(sizes), device=order_M.device).repeat_interleave(
            torch.tensor(sizes, device=order_M.device), output_size=len(order_M)
        )
        back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        shape = (len(logits_TN), -1)
        return logits_TN, gates_M[back_M].view(shape), sorted_M[back_M].view(shape)

    def native_output(self, decisions: Decisions) -> tuple[Any, ...]:
        """See `MoeLayer.native_output`."""
        logits_TN, weights_Tk, indices_Tk = decisions
        experts_M = indices_Tk.flatten()
        order_M = experts_M.argsort(stable=True)
        sizes: list[int] = experts_M.bincount(minlength=self.num_experts).tolist()
        return order_M, order_M // indices_Tk.shape[1], weights_Tk.flatten()[order_M], sizes, logits_TN

    def routed_outputs(self, x_TH: torch.Tensor) -> torch.Tensor:
        """See `MoeLayer.routed_outputs`."""
        block: Any = self.block
        routed: torch.Tensor = block(x_TH[None])[0] - block.bias
        return routed

    @property
    def num_routed(self) -> int:
        """See `MoeLayer.num_routed`."""
        block: Any = self.block
        return int(block.input_linear.weight.numel() + block.output_linear.weight.numel())

    def expert_weights(self) -> ExpertWeights:
        """See `MoeLayer.expert_weights`; of an FFN."""
        block: Any = self.block
        return ExpertWeights(block.input_linear.weight, block.output_linear.weight, block.activation)

    @property
    def router_NH(self) -> torch.nn.Parameter:
        """See `MoeLayer.router_NH`."""
        router: Any = self.router
        return router.layer.weight  # type: ignore[no-any-return]


def find_moe_layers(model: torch.nn.Module) -> list[MoeLayer]:
    """Return all mixture-of-experts layers in order of depth, by the router class that the model's class declares.

    A decoder layer whose attention is routed, too, has two: attention, then FFN.

    Args:
        model: A native model of transformers (wrapped by DDP, FSDP or peft, or not).

    Raises:
        CheckpointError: There are none, or a router is not supported.
        RefusedError: Its routing is not one that llamamoe writes.
    """
    config: Any = getattr(_base(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = causal_type(getattr(text, "model_type", ""))
    refuse_unsupported(vars(text) | {"model_type": model_type})
    router_class = _router_class(model)
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if router_class is not None and isinstance(module, router_class):
            parent, _, _ = name.rpartition(".")
            index = layer_of(name)
            if index is None:
                raise CheckpointError(f"the router {name!r} belongs to no decoder layer.")
            found.append(_moe_layer(index, parent, modules[parent], module, model_type))
    if not found:
        raise CheckpointError(
            f"{_base(model).__class__.__name__} has no router: it is not a mixture of experts.",
            hint="Convert it first: llamamoe split SOURCE OUT.",
        )
    return sorted(found, key=lambda each: each.place)


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
            if isinstance(recorded, list):  # JetMoE's attention returns the logits of its router once more
                recorded = recorded[-1]
            found: type[torch.nn.Module] = getattr(recorded, "target_class", recorded)
            return found
    return None


def _moe_layer(index: int, name: str, block: torch.nn.Module, router: Any, model_type: str) -> MoeLayer:
    attention = routes_attention(model_type)
    if model_type not in TARGETS or not (attention or hasattr(block, "experts")):
        raise CheckpointError(
            f"{type(router).__name__}: how this router weighs its experts is not known here.",
            hint=f"Known are the routers of {', '.join(each.name for each in TARGETS if each.routed)}.",
        )
    weighting = _weighting(TARGETS.get(model_type), router)
    factor = float(getattr(router, "routed_scaling_factor", 1.0))
    sizes = (int(router.num_experts), int(router.top_k))
    if not attention:
        return MoeLayer(index, name, block, router, *sizes, weighting, factor)
    part: Literal["attention", "ffn"] = "attention" if ".self_attention." in f".{name}." else "ffn"
    return JetMoeLayer(index, name, block, router, *sizes, weighting, factor, part)


def _weighting(target: type[Target], router: Any) -> RouterWeighting:
    """Return this router's weighting: the target's only one, or the one that its flag selects (see `mixing_of`)."""
    first = len(target.weightings) == 1 or getattr(router, "norm_topk_prob", True)
    return target.router_weighting(target.weightings[0 if first else 1])
