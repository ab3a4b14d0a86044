"""Refuse checkpoints that `heal` cannot train together, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable

from ..architectures.dense_checkpoint import DenseModel, refuse_foreign
from ..architectures.expert_weighting import mixing_of
from ..architectures.targets import TARGETS
from ..architectures.targets.base import Target
from ..checkpoint.base import FLOAT_DTYPES
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.tensor_names import FUSED, IN_MEMORY
from ..checkpoint.text_part import whole_hint
from ..errors import CheckpointError, RefusedError
from .recipe import HealRecipe


def healed_target(checkpoint: SafetensorsCheckpoint) -> Target:
    """Return the architecture of the checkpoint.

    Raises:
        CheckpointError: It is not a mixture of experts that can be healed.
    """
    config = checkpoint.config
    refuse_foreign(checkpoint)
    name = config.get("model_type")
    known = [each.name for each in TARGETS if each.routed]
    if name not in known:
        raise CheckpointError(
            f"MODEL: model_type {name!r} is not a mixture of experts that can be healed.",
            hint=whole_hint(config, f"Convert the dense model first (llamamoe split). Supported: {', '.join(known)}."),
        )
    fused = None if name in IN_MEMORY else next((n for n in checkpoint.tensors if FUSED.match(n)), None)
    if fused is not None:
        raise CheckpointError(
            f"MODEL's weights have the names that transformers 5 uses in memory ({fused}).",
            hint="Load the folder with transformers 5 and save it again without save_original_format=False.",
        )
    return mixing_of(config).target


def check_inputs(recipe: HealRecipe, target: Target) -> None:
    """Refuse inputs that the architecture does not give.

    Raises:
        RefusedError: The attention of MODEL is routed, and its hidden states are needed.
    """
    if target.attention_experts and recipe.inputs == "model":
        raise RefusedError(
            f"inputs = model needs the hidden states of MODEL, but the attention of {target.name} is routed and layers run "
            "with the parent's attention.",
            hint="Train on the parent's hidden states: --set inputs=parent.",
        )


def check_fit(checkpoint: SafetensorsCheckpoint, dense: DenseModel, target: Target, layers: tuple[int, ...]) -> None:
    """Refuse two checkpoints of different sizes.

    Raises:
        RefusedError: The sizes differ; the message names every difference.
        CheckpointError: MODEL lacks routers.
    """
    config, spec = checkpoint.config, dense.spec
    wanted = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "vocab_size": spec.vocab_size,
        "num_attention_heads": spec.num_heads,
    }
    if target.attention_experts:  # its own number of heads is that of the selected ones
        del wanted["num_attention_heads"]
        wanted |= {"num_key_value_heads": spec.num_kv_heads, "num_local_experts": spec.num_heads // spec.num_kv_heads}
    wrong = [f"{key} is {config.get(key)} and {value}" for key, value in wanted.items() if config.get(key) != value]
    if wrong:
        raise RefusedError(
            f"MODEL was not made from this parent: {'; '.join(wrong)}.", hint="Give its own parent with --parent."
        )
    if not layers or layers[-1] >= spec.num_layers:
        raise CheckpointError("MODEL's files lack the routers of its architecture.")


def check_dtypes(checkpoint: SafetensorsCheckpoint, trained: Iterable[str]) -> None:
    """Refuse weights in whole numbers.

    Raises:
        CheckpointError: A tensor cannot be trained.
    """
    for name in trained:
        if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"MODEL: {name} is stored as {checkpoint.tensors[name].dtype}, which cannot be trained.",
                hint="Heal the checkpoint before it is quantised.",
            )
