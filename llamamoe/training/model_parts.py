"""Find layers, FFNs and output head of a causal language model of transformers, whatever wraps it."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from ..lazy import torch, transformers


def find_causal_lm(model: torch.nn.Module) -> Any:
    """Return the causal language model of transformers inside peft, DDP, FSDP2 or no wrapper.

    Raises:
        CheckpointError: There is no model with an output head.
    """
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise CheckpointError(
        f"{type(model).__name__} has no output head: it is not a causal language model.",
        hint="Load it with AutoModelForCausalLM.",
    )


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """Return the decoder layers, in order of depth.

    Raises:
        CheckpointError: They are not in the same place as in Llama.
    """
    base = find_causal_lm(model).base_model
    layers = getattr(base, "layers", None)
    if layers is None:
        raise CheckpointError(f"{type(base).__name__} keeps its layers in a place that is not known here.")
    return list(layers)


def ffn_modules(layer: Any) -> list[torch.nn.Module]:
    """Return the modules of a decoder layer that get the FFN's input and whose outputs add up to the FFN's output.

    There is one, except for granitemoeshared, which keeps shared neurons beside the block of router and experts.
    """
    block = getattr(layer, "block_sparse_moe", None)
    shared = getattr(layer, "shared_mlp", None)
    return [module for module in (layer.mlp if block is None else block, shared) if module is not None]


def residual_multiplier(layer: Any) -> float:
    """Return the factor of the FFN's output when a decoder layer adds it to the residual stream."""
    return float(getattr(layer, "residual_multiplier", 1.0))


def first_tensor(output: Any) -> torch.Tensor:
    """Return a module's output, or the first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
