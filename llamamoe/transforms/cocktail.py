"""Weights of a merge by how well each model predicts a few examples (LM-Cocktail)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path

from ..evaluation.perplexity import evaluate
from ..progress import Progress, ProgressCallback

TEMPERATURE = 5.0
"""The temperature of the authors' code."""
_DIGITS = 6
"""Digits of the weights: losses differ in their last digits between numbers of threads, and a resumed call must not."""


def cocktail_weights(losses: Sequence[float], temperature: float = TEMPERATURE) -> tuple[float, ...]:
    """Return ``softmax(-loss / temperature)``, rounded to six digits.

    Reference: Xiao et al., "LM-Cocktail: Resilient Tuning of Language Models via Model Merging" (arXiv:2311.13534).

    Args:
        losses: Loss of each model on the examples, in nats per token.
        temperature: Above 0; the smaller, the more the best model counts.
    """
    least = min(losses)
    powers = [exp((least - loss) / temperature) for loss in losses]
    return tuple(round(power / sum(powers), _DIGITS) for power in powers)


def example_losses(
    models: Sequence[str | Path], examples: Sequence[str | Path], progress: ProgressCallback
) -> tuple[float, ...]:
    """Return each model's mean loss of a token of the examples, in nats; one model is in memory at a time.

    Raises:
        UsageError: There is no such text.
        LlamaMoeError: The text has nothing to score, or a loss is not finite.
    """
    found = []
    for index, model in enumerate(models):

        def report(step: Progress, index: int = index) -> None:
            progress(replace(step, stage=f"evaluate {index + 1} of {len(models)}"))

        found.append(evaluate(model, examples, progress=report).model.overall.loss)
    return tuple(found)
