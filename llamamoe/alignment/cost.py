"""Estimate the cost of an alignment from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..architectures.sources.base import DenseSpec
from ..calibration.compute import REFERENCE_FLOPS
from ..errors import LlamaMoeError
from ..models.loading import LOGITS_AT_ONCE
from .recipe import MAX_LENGTH, AlignmentOptions

HELD_OUT = 1 / 16
"""Share of the sequences that are held out, on which states of the learning are compared."""
MOST_HELD_OUT = 1 << 14
"""Maximum number of held-out tokens."""
MOMENTS = 3
"""float32 numbers kept for each learned one: its value, Adam's two moments and, while it learns, its gradient."""


@dataclass(frozen=True)
class AlignmentPlan:
    """Sizes and costs of learning through the whole model.

    Attributes:
        options: The requested options.
        learned: Number of learned values.
        peak_bytes: Estimate of the peak anonymous memory.
        state_bytes: Peak size of the files beside the output from which a stopped run resumes: the start, and the state twice,
            because a new one is complete before the last one goes.
        flops: Floating-point operations.
    """

    options: AlignmentOptions
    learned: int
    peak_bytes: int
    state_bytes: int
    flops: int

    def seconds(self, flops_per_second: float = REFERENCE_FLOPS) -> float:
        """Return an estimate of the time at a given rate of operations."""
        return self.flops / flops_per_second

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data, the same for every run."""
        return {
            "tokens": self.options.tokens,
            "sequence_length": self.options.length,
            "tokens_per_step": self.options.batch,
            "weights": self.options.weights,
            "learned_numbers": self.learned,
            "peak_memory_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
            "flops": self.flops,
            "seconds_at_reference": round(self.seconds(), 1),
        }


def held_out_sequences(sequences: int, length: int) -> int:
    """Return how many sequences of a text are held out.

    Args:
        sequences: Number of sequences in the text.
        length: Tokens of each.

    Raises:
        LlamaMoeError: Nothing would be left to learn from.
    """
    held_out = max(1, min(round(sequences * HELD_OUT), MOST_HELD_OUT // length))
    if held_out >= sequences:
        raise LlamaMoeError(
            f"the text gives {sequences} sequence of {length} tokens, which is held out: nothing is left to align on.",
            hint="Give more text, or a smaller align.length.",
        )
    return held_out


def plan_alignment(
    spec: DenseSpec, options: AlignmentOptions, *, layers: int, num_experts: int, compute_bytes: int
) -> AlignmentPlan:
    """Estimate the cost of an alignment. O(1).

    Args:
        spec: The parent.
        options: Number of tokens and the weights that are trained.
        layers: Number of converted layers.
        num_experts: N.
        compute_bytes: Bytes per number of the compute dtype.
    """
    hidden, ffn, length = spec.hidden_size, spec.intermediate_size, options.length or MAX_LENGTH
    matrices = 3 * ffn * hidden
    attention = 2 * hidden * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    table = spec.vocab_size * hidden
    trained = {"frozen": 0, "scales": ffn, "ffn": matrices}[options.weights]
    learned = layers * (ffn * (num_experts + 2) + num_experts * hidden + trained)
    body = spec.num_layers * (matrices + attention + spec.head_dim * spec.num_heads * length)
    # parent and student forward, and back to the inputs: 2 operations for each multiply-add
    per_token = 2 * (3 * body + 3 * table + (layers * matrices if trained == matrices else 0))
    weights = compute_bytes * (
        spec.num_layers * (matrices + attention) + (1 if spec.tie_word_embeddings else 2) * table
    )
    activations = compute_bytes * options.batch * spec.num_layers * (2 * ffn + 10 * hidden)
    ids = 8 * options.tokens
    copies = compute_bytes * matrices * layers if trained == matrices and compute_bytes < 4 else 0
    return AlignmentPlan(
        options=options,
        learned=learned,
        peak_bytes=weights
        + activations
        + copies
        + 4 * (MOMENTS + 1) * learned
        + 4 * layers * trained
        + 4 * 4 * LOGITS_AT_ONCE
        + ids,
        state_bytes=4 * (2 * (MOMENTS + 1) + 1) * learned + ids,
        flops=options.tokens * per_token,
    )
