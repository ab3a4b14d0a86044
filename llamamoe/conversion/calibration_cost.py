"""Estimate the cost of calibration from sizes alone: bytes of hidden states, multiply-adds and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.moe_layout import MoeLayout
from ..architectures.sources.base import DenseSpec
from ..calibration.compute import MAX_LENGTH, MEMORY_BYTES, MIN_TOKENS, REFERENCE_FLOPS
from ..data.files import UNPACKED, find_files, unpacked_bytes
from ..errors import RefusedError, UsageError
from ..methods.layer import batch_tokens
from ..methods.repairs import REPAIRS
from ..methods.repairs.least_squares import MOST_PLACES
from ..methods.splitters import SPLITTERS
from ..recipes import plugin
from .attention_cost import attention_bytes, attention_flops
from .defaults import Chosen
from .recipe import SplitRecipe

SWEEPS = 4
"""Assumed number of passes of a layer's methods over its activations, beside those counted exactly."""


@dataclass(frozen=True)
class CalibrationPlan:
    """Sizes and costs of the walk over the calibration text.

    Attributes:
        tokens: Maximum number of tokens of text.
        length: Tokens per sequence.
        gradients: Whether a reverse pass through the parent comes first.
        needing: The methods that need text.
        state_bytes: Size of the two residual streams in files beside the output; for gradients of every layer's
            (`ffn_gradients`).
        input_bytes: Size of one FFN's inputs, in float32.
        input_place: ``"memory"`` or ``"memory-mapped"``.
        peak_bytes: Estimate of the peak anonymous memory of calibration.
        layer_flops: Floating-point operations of one converted layer.
        flops: Floating-point operations of all layers.
    """

    tokens: int
    length: int
    gradients: bool
    needing: tuple[str, ...]
    state_bytes: int
    input_bytes: int
    input_place: str
    peak_bytes: int
    layer_flops: int
    flops: int

    @property
    def disk_bytes(self) -> int:
        """Size of the files beside the output during the run."""
        return self.state_bytes + (self.input_bytes if self.input_place == "memory-mapped" else 0)

    def seconds(self, flops_per_second: float = REFERENCE_FLOPS) -> float:
        """Return an estimate of the time at a given rate of operations."""
        return self.flops / flops_per_second

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data, the same for every run."""
        return {
            "tokens": self.tokens,
            "sequence_length": self.length,
            "needed_by": list(self.needing),
            "gradients": self.gradients,
            "hidden_state_bytes": self.state_bytes,
            "hidden_states_in": "memory-mapped",
            "ffn_input_bytes": self.input_bytes,
            "ffn_inputs_in": self.input_place,
            "flops_per_layer": self.layer_flops,
            "flops": self.flops,
            "reference_flops_per_second": REFERENCE_FLOPS,
            "seconds_at_reference": round(self.seconds(), 1),
        }


def plan_calibration(
    spec: DenseSpec,
    chosen: Chosen,
    layout: MoeLayout,
    text_tokens: int | None = None,
    *,
    attention_experts: bool = False,
) -> CalibrationPlan:
    """Estimate the cost of calibration for a recipe whose methods need it. O(1).

    Args:
        spec: The model.
        chosen: The recipe, with its methods.
        layout: Sizes of the conversion.
        text_tokens: Maximum number of tokens that the text has; None if it is not known.
        attention_experts: Whether attention is converted, too.

    Raises:
        RefusedError: Sequences would be longer than the model has positions.
    """
    recipe = chosen.recipe
    length = sequence_length(recipe.calibration_length, MAX_LENGTH, spec, "--calibration-length", "calibration_length")
    wanted = recipe.calibration_tokens if text_tokens is None else min(recipe.calibration_tokens, text_tokens)
    length = min(length, wanted)
    tokens = wanted // length * length
    stream = 4 * tokens * spec.hidden_size
    converted = spec.num_layers - len(layout.dense_layers)
    attention = _attention_flops(spec, tokens, length)
    dense = 6 * tokens * spec.intermediate_size * spec.hidden_size
    layer = attention + _layer_flops(spec, chosen, layout, tokens)
    if attention_experts:
        layer += attention_flops(spec, recipe, layout.num_experts, tokens, attention)
    flops = converted * layer + len(layout.dense_layers) * (attention + dense)
    if chosen.gradients:  # forward, forward again, and backward at twice the cost
        head = 2 * tokens * spec.vocab_size * spec.hidden_size
        flops += 4 * spec.num_layers * (attention + dense) + 3 * head
    in_memory = stream <= MEMORY_BYTES
    return CalibrationPlan(
        tokens=tokens,
        length=length,
        gradients=chosen.gradients,
        needing=chosen.needing,
        state_bytes=(spec.num_layers + 3 if chosen.gradients else 2) * stream,
        input_bytes=stream,
        input_place="memory" if in_memory else "memory-mapped",
        peak_bytes=_peak_bytes(spec, chosen, layout, attention_experts=attention_experts)
        + (stream if in_memory else 0),
        layer_flops=layer,
        flops=flops,
    )


def most_tokens(paths: Sequence[str | Path]) -> int:
    """Return an upper bound of the tokens of text, from the size of its files: a token has a byte. Opens none.

    Raises:
        UsageError: The files cannot hold `MIN_TOKENS` tokens, a path or glob matches nothing, a folder holds no text, or a
            file is of an unknown kind.
    """
    files = [path for path, _ in find_files(paths)]
    size = unpacked_bytes(files)
    packed = any(path.suffix in UNPACKED for path in files)  # how much is in a small one, its size does not tell
    if 2 * size < MIN_TOKENS and not packed:  # a document is a byte at least, and ends with a token of its own
        raise UsageError(
            f"The calibration text has only {size:.0f} bytes in {len(files)} {'file' if len(files) == 1 else 'files'}; at least "
            f"{MIN_TOKENS} tokens are needed.",
            hint="Provide more text; 65536 tokens are a good amount.",
        )
    return max(MIN_TOKENS, round(size))


def sequence_length(asked: int | None, most: int, spec: DenseSpec, name: str, key: str) -> int:
    """Return the tokens per sequence: as requested, else the model's positions, but at most ``most``.

    Args:
        asked: The value in the recipe.
        most: Limit if the recipe has no value.
        spec: The model.
        name: Its name in the message.
        key: Its key in the recipe.

    Raises:
        RefusedError: Sequences would be longer than the model has positions.
    """
    positions = spec.max_position_embeddings
    if (asked or 0) > positions:
        raise RefusedError(f"{name} {asked} is more than the model's {positions} positions (--set {key}={positions}).")
    return asked or min(most, positions)


def _places(layout: MoeLayout) -> int:
    return layout.num_shared + layout.num_experts * layout.expert_width


def _attention_flops(spec: DenseSpec, tokens: int, length: int) -> int:
    heads = spec.head_dim * spec.num_heads
    projections = 2 * spec.hidden_size * (2 * heads + 2 * spec.head_dim * spec.num_kv_heads)
    return tokens * (projections + 4 * heads * length)


def _layer_flops(spec: DenseSpec, chosen: Chosen, layout: MoeLayout, tokens: int) -> int:
    """Return the FFN's share of one converted layer: the methods' passes, repair, its check, and the output."""
    places, passes = _places(layout), chosen.recipe.repair_passes
    sweep = 4 * spec.intermediate_size * spec.hidden_size
    dense, moe = 6 * spec.intermediate_size * spec.hidden_size, 6 * places * spec.hidden_size
    per_token = SWEEPS * sweep + dense + 2 * moe
    solve = 0
    if chosen.recipe.repairs:
        solved = min(places, MOST_PLACES)
        sweeps = -(-places // max(solved, 1))
        per_token += passes * (sweeps * (dense + moe) + moe + places * solved)
        solve = passes * places * (solved * solved // 3 + 4 * solved * spec.hidden_size)
    return tokens * per_token + solve + _training_flops(spec, chosen.recipe, layout, tokens)


def _training_flops(spec: DenseSpec, recipe: SplitRecipe, layout: MoeLayout, tokens: int) -> int:
    """Return the operations of gradient steps: of the method on routed neurons, of the repair in each of its passes."""
    splitter = plugin(SPLITTERS, recipe.method)
    flops: int = splitter.training_flops(spec.intermediate_size - layout.num_shared, spec.hidden_size, tokens)
    if recipe.repairs:
        repair = plugin(REPAIRS, recipe.repair)
        flops += recipe.repair_passes * repair.training_flops(_places(layout), spec.hidden_size, tokens)
    return flops


def _peak_bytes(spec: DenseSpec, chosen: Chosen, layout: MoeLayout, *, attention_experts: bool) -> int:
    """Estimate the peak: a layer in float32 and its parts, conversion candidates, a batch of activations, repair.

    Attention is repaired before the FFN, so that the larger of both counts.
    """
    places, hidden = _places(layout), spec.hidden_size
    weights = 4 * 3 * places * hidden
    attention = 4 * hidden * 2 * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    batch = 4 * batch_tokens(places) * (4 * max(places, spec.intermediate_size) + 6 * hidden)
    total = attention + 4 * 3 * spec.intermediate_size * hidden + weights + batch
    table = 4 * spec.vocab_size * hidden * (1 if spec.tie_word_embeddings else 2)
    working = 0
    if chosen.recipe.repairs:
        assert chosen.recipe.repair is not None
        repair = REPAIRS.get(chosen.recipe.repair.name)
        working = chosen.recipe.repair_passes * weights + repair.working_bytes(places, hidden)
    if attention_experts:
        working = max(working, attention_bytes(spec, chosen.recipe))
    return total + working + table
