"""Compute targets of a layer's routed experts: the parent's FFN output minus that of the shared neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..lazy import torch
from .model_parts import decoder_layers, ffn_modules, first_tensor, residual_multiplier
from .parent import Parent
from .routing import Routing


def routed_targets(model: torch.nn.Module, parent: Parent) -> Callable[[Routing], torch.Tensor]:
    """Return the targets for losses that compare experts with the parent (`LossContext.targets`).

    The shared neurons' part is the FFN's output minus that of the routed experts, so FFN and experts run once
    more without gradient, and the parent's FFN once.

    Args:
        model: The trained model, with unsharded experts on every rank.
        parent: Its dense parent.

    Returns:
        A function from a `Routing` with inputs to float32 ``[T, H]`` without gradient.
    """
    layers = decoder_layers(model)

    def targets(routing: Routing) -> torch.Tensor:
        moe, x_TH = routing.moe, routing.inputs_TH
        assert x_TH is not None
        layer: Any = layers[moe.layer]
        with torch.no_grad():
            aim_TH = parent.ffn(moe.layer, x_TH).float() / residual_multiplier(layer)
            whole_TH = sum(first_tensor(module(x_TH[None]))[0].float() for module in ffn_modules(layer))
            shared_TH = whole_TH - moe.routed_outputs(x_TH).float()
            found_TH: torch.Tensor = aim_TH.to(shared_TH.device) - shared_TH
        return found_TH

    return targets
