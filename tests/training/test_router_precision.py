"""Routers in float32 under autocast: their logits are not rounded, whatever the architecture and the gate."""

from __future__ import annotations

import pytest
import torch

from llamamoe.training.gates import GATES
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.router_precision import route_in_float32

from .tiny_moe import ARCHITECTURES, H, tiny_moe


@pytest.mark.parametrize("gate", ["top_k", "noisy_top_k"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_without_autocast(architecture: str, gate: str) -> None:
    model = tiny_moe(architecture)
    layers = find_moe_layers(model)
    x_TH = torch.randn(9, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x_TH.float() @ layers[0].router_NH.T
    route_in_float32(layers)
    kind = GATES.get(gate)
    kind(kind.Options()).attach(layers, 0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layers[0].decisions(layers[0].router(x_TH))[0]
    torch.testing.assert_close(logits, expected)
    rounded = torch.nn.functional.linear(x_TH, layers[0].router_NH.bfloat16()).float()
    assert not torch.allclose(rounded, expected, rtol=1e-5, atol=1e-6), "bfloat16 does not show"
