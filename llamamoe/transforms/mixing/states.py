"""Run BASE over sequences one layer at a time and give the states that a router could read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from ...architectures.dense_checkpoint import DenseModel
from ...checkpoint.tensors import torch_dtype
from ...checkpoint.tokenizer_loading import needed_tokenizer
from ...errors import LlamaMoeError
from ...lazy import torch
from ...models.streaming import LayerRunner, StreamedModel
from ...progress import Progress, ProgressCallback

_BATCH = 8
"""Number of sequences that run at once."""
States = Literal["ffn_input", "layer_input"]


def tokenizer_of(base: DenseModel, what: str) -> Any:
    """Return BASE's tokenizer.

    Args:
        base: The model.
        what: What is to be read with it, for the message.

    Raises:
        CheckpointError: It has none, or transformers cannot load it.
    """
    missing = f"{base.checkpoint.path} has no tokenizer, so {what} cannot be read."
    return needed_tokenizer(base.checkpoint, missing, "Use --router random.")


def padded(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids ``[S, T]``, filled up at their end, which attention does not look at, and True for the real ones."""
    longest = max(map(len, ids))
    found = torch.tensor([[*each, *[0] * (longest - len(each))] for each in ids])
    return found, torch.arange(longest) < torch.tensor([len(each) for each in ids])[:, None]


def layer_states(
    base: DenseModel, ids_ST: torch.Tensor, states: States, dtype: str, stage: str, progress: ProgressCallback
) -> Iterator[torch.Tensor]:
    """Yield the states ``[S, T, H]`` of each layer in turn, in one tensor that the next layer's replace.

    One layer is in memory, and the states twice.

    Args:
        base: The model.
        ids_ST: Token ids.
        states: ``ffn_input``, what the router will read, or ``layer_input``, the residual stream before the attention.
        dtype: The model's dtype in the result, as in safetensors headers.
        stage: What this is for, for ``progress``.
        progress: Called after every layer.

    Raises:
        LlamaMoeError: A state is not finite.
    """
    stored = torch_dtype(dtype)
    with torch.no_grad():
        streamed = StreamedModel.of_dense(base, lambda name: base.checkpoint.read(name).to(stored))
        runner = LayerRunner(streamed, ids_ST.shape[1])
        hidden = torch.cat([runner.embed(part) for part in torch.split(ids_ST, _BATCH)])
        found = torch.empty_like(hidden)
        for layer in range(runner.num_layers):
            seen: list[torch.Tensor] = []
            with runner.layer(layer) as module:
                where: torch.nn.Module = module if states == "layer_input" else module.mlp  # type: ignore[assignment]
                handle = where.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                for start in range(0, len(hidden), _BATCH):
                    part = slice(start, start + _BATCH)
                    after = runner.run(layer, module, hidden[part])
                    found[part] = seen.pop()  # before its input, which it may be, is replaced
                    hidden[part] = after
                handle.remove()
            if not bool(found.isfinite().all()):
                raise LlamaMoeError(f"layer {layer}: hidden states of the {stage} are NaN or infinite.")
            progress(Progress(stage, layer + 1, runner.num_layers, "layer"))
            yield found
