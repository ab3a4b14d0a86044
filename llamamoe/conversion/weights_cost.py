"""Count what the weights of a conversion take: parameters, files, and memory while they are written."""

from __future__ import annotations

import math

from ..architectures.costs import Cost, count, role_of
from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_layout import MoeLayout, OutTensor
from ..architectures.sources.base import DenseSpec, canonical_shapes
from ..architectures.targets.base import Target
from ..checkpoint.base import DTYPE_BYTES
from ..checkpoint.layout import Shards, deal
from ..checkpoint.memory import MOST_BYTES
from ..checkpoint.writer import QUEUE_BYTES
from ..methods.splitters.base import Splitter
from .recipe import AUTO, SplitRecipe


def shards_of(tensors: tuple[OutTensor, ...], dtype: str, shard_size: str) -> Shards:
    """Return the position of every tensor in files."""
    entries = {t.name: (t.dtype or dtype, t.shape, math.prod(t.shape) * DTYPE_BYTES[t.dtype or dtype]) for t in tensors}
    return deal(entries, shard_size)


def cost_of_parent(model: DenseModel) -> Cost:
    """Return the cost of the dense model."""
    return count(
        (
            (role_of(n), s, math.prod(s) * DTYPE_BYTES[model.dtype_of(n)])
            for n, s in canonical_shapes(model.spec).items()
        ),
        tied=model.spec.tie_word_embeddings,
    )


def cost_of_output(
    spec: DenseSpec, target: Target, layout: MoeLayout, tensors: tuple[OutTensor, ...], dtype: str
) -> Cost:
    """Return the cost of the tensors that a conversion writes."""
    return count(
        ((t.role, t.shape, math.prod(t.shape) * DTYPE_BYTES[t.dtype or dtype]) for t in tensors),
        active_share=layout.active_share,
        tied=target.ties(spec),
    )


def sampling_bytes(parent: Cost, recipe: SplitRecipe) -> int:
    """Return the memory of the whole parent, if it writes the calibration text; 0 otherwise."""
    width = 2 if recipe.compute_dtype == "bfloat16" else 4  # float32, or chosen by the machine
    return width * parent.total_parameters if AUTO in recipe.calibration else 0


def writing_bytes(spec: DenseSpec, splitter: Splitter, layout: MoeLayout, dtype: str) -> int:
    """Estimate the peak: two gathered FFN matrices, bytes waiting for the disk, the splitter and replaced weights."""
    matrix = spec.intermediate_size * spec.hidden_size
    table = spec.vocab_size * spec.hidden_size
    places = layout.num_shared + layout.num_experts * layout.expert_width
    replaced = 0 if splitter.kept == "neurons" else 4 * places * spec.hidden_size  # bytes of a float32 matrix
    return (
        max(MOST_BYTES, QUEUE_BYTES + max(2 * matrix, table) * DTYPE_BYTES[dtype])
        + 4 * replaced  # three matrices, and one while it is made
        + splitter.working_bytes(spec.intermediate_size, spec.hidden_size)
    )
