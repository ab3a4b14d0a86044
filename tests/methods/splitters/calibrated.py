"""Tiny layers with calibration inputs, for the tests of every method that looks at activations."""

from __future__ import annotations

import numpy as np
import torch

from llamamoe.methods.layer import FfnWeights, LayerContext, LayerInputs


def random_ffn(size: int = 24, hidden: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> FfnWeights:
    """Weights [F, H] of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(shape, generator=generator) for shape in ((size, hidden),) * 2 + ((hidden, size),))
    return FfnWeights(gate.to(dtype), up.to(dtype), down.to(dtype), torch.ones(hidden, dtype=dtype))


def layer_inputs(x_TH: torch.Tensor, batch_tokens: int = 4096) -> LayerInputs:
    """Inputs with nothing beside them."""
    ones = torch.ones(len(x_TH))
    return LayerInputs(x_TH, ones, torch.device("cpu"), torch.float32, batch_tokens=batch_tokens)


def random_inputs(tokens: int = 40, hidden: int = 8, seed: int = 1, batch_tokens: int = 4096) -> LayerInputs:
    """Normal inputs [T, H] around a common mean, as behind an RMSNorm."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator) + torch.randn(hidden, generator=generator)
    return layer_inputs(x, batch_tokens)


def layer_context(
    inputs: LayerInputs | None, width: int, num_experts: int = 4, top_k: int = 2, seed: int = 0, layer: int = 0
) -> LayerContext:
    """N experts of width W."""
    return LayerContext(layer, num_experts, top_k, width, seed, inputs)


def plain_hidden(ffn: FfnWeights, x_TH: torch.Tensor) -> np.ndarray:
    """float64 [T, F]: ``silu(gate x) (up x)``, written out."""
    gate, up, x = (a.double().numpy() for a in (ffn.gate_FH, ffn.up_FH, x_TH))
    z = x @ gate.T
    return z / (1 + np.exp(-z)) * (x @ up.T)
