"""Find what a converted model holds beyond a dense one, and a model that cannot be its parent."""

from __future__ import annotations

from collections.abc import Iterator

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_checkpoint import ConvertedModel
from ..architectures.targets.granitemoe_swa import CLOSED_SINK
from ..errors import RefusedError


def check_like(converted: ConvertedModel, parent: DenseModel) -> None:
    """Check that a model could have the same neurons at all."""
    for name in ("num_layers", "hidden_size"):
        mine, theirs = getattr(converted.spec, name), getattr(parent.spec, name)
        if mine != theirs:
            raise RefusedError(f"--like has {name} {theirs}, but the model has {mine}: it was not made from it.")


def refuse_biases(converted: ConvertedModel) -> None:
    """Refuse biases of FFNs, which are zero until they are trained."""
    names = (name for name in converted.checkpoint.tensors if name.endswith(".mlp.bias"))
    trained = next((name for name in names if bool(converted.checkpoint.read(name).any())), None)
    if trained is not None:
        raise RefusedError(
            f"{trained} is not zero: it was trained, and the FFN of no dense architecture here has such a bias.",
            hint="Use the dense model that it was made from, or the model before it was trained.",
        )


def open_sinks(converted: ConvertedModel) -> Iterator[str]:
    """Yield a reason if attention gives weight to sinks, which no dense architecture here has."""
    for name in converted.checkpoint.tensors:
        if name.endswith(".sinks") and bool((converted.checkpoint.read(name) > CLOSED_SINK / 2).any()):
            yield f"{name} holds attention sinks that take weight"
            return
