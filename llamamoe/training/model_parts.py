"""Locate the layers, FFNs and output head of a causal language model of transformers, whatever wraps it."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from ..lazy import torch, transformers


def find_causal_lm(model: torch.nn.Module) -> Any:
    """The causal language model of transformers inside peft, DDP, FSDP2 or nothing.

    Raises:
        CheckpointError: There is none with an output head.
    """
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise CheckpointError(
        f"{type(model).__name__} has no output head: it is not a causal language model.",
        hint="Load it with AutoModelForCausalLM.",
    )


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """The decoder layers, in order of depth.

    Raises:
        CheckpointError: They are not where Llama has them.
    """
    base = find_causal_lm(model).base_model
    layers = getattr(base, "layers", None)
    if layers is None:
        raise CheckpointError(f"{type(base).__name__} keeps its layers in a place that is not known here.")
    return list(layers)


def ffn_modules(layer: Any) -> list[torch.nn.Module]:
    """The modules of a decoder layer that all see the FFN's input and whose outputs add up to the FFN's output.

    It is one, but for granitemoeshared, which keeps shared neurons beside the block of router and experts.
    """
    block = getattr(layer, "block_sparse_moe", None)
    shared = getattr(layer, "shared_mlp", None)
    return [module for module in (layer.mlp if block is None else block, shared) if module is not None]


def residual_multiplier(layer: Any) -> float:
    """Return the factor of a decoder layer on the FFN's output before it is added to the residual stream."""
    return float(getattr(layer, "residual_multiplier", 1.0))


def first_tensor(output: Any) -> torch.Tensor:
    """A module's output, or the first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
