"""Router rows from a text of each expert: a linear classifier of tokens by the text that they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...architectures.dense_checkpoint import DenseModel
from ...calibration.compute import MAX_LENGTH
from ...calibration.text import calibration_text
from ...lazy import torch
from ...numerics import check_finite, solve_ridge
from ...progress import ProgressCallback
from .expert_texts import text_of
from .recipe import MixRecipe
from .states import layer_states, padded, tokenizer_of

_RIDGE = 1e-3
"""Strength of the ridge penalty, as a share of the mean square of the inputs; as of the routers of ``split``."""
_HELD_OUT = 5
"""Every so many tokens of an expert's text one is held out: the last ones, which fit the scale and are measured."""
_SCALES = (math.log(1 / 16), math.log(16))
"""Range of s: texts that are told apart without error would have it grow without end, and the logits with it."""
_ROWS = 4096
"""Tokens that are in float64 at a time."""
_STEPS = 40
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class TextRouter:
    """A router fitted to texts.

    Attributes:
        rows: Rows of each layer, float32 ``[N, H]``.
        facts: Origin and amount of the texts, and how well each layer tells them apart, for the receipt.
        warnings: Sentences for the user.
    """

    rows: Mapping[int, torch.Tensor]
    facts: dict[str, Any]
    warnings: tuple[str, ...]


def fit_text_router(base: DenseModel, recipe: MixRecipe, dtype: str, progress: ProgressCallback) -> TextRouter:
    """Fit a router that sends a token to the experts in whose texts such tokens are.

    In each layer the rows are ``s R``: R is the ridge regression of the token's expert (one-hot, minus 1/N) on the FFN's
    input in BASE, every expert's text weighing the same, without intercept as a softmax router has none; s, at most 16,
    minimises the cross-entropy of ``softmax(s R x)`` on held-out tokens. Memory: the states of all texts in one layer, twice.

    Raises:
        CheckpointError: BASE has no tokenizer.
        UsageError, LlamaMoeError: A text is missing, too short or unreadable, or a state is not finite.
    """
    assert recipe.texts is not None
    tokenizer = tokenizer_of(base, "text")
    length = min(MAX_LENGTH, base.spec.max_position_embeddings)
    texts = []
    for expert, (model, paths) in enumerate(zip(recipe.experts, recipe.texts, strict=True)):
        with text_of(expert, model):
            texts.append(
                calibration_text(
                    paths,
                    tokenizer,
                    num_tokens=recipe.text_tokens,
                    length=length,
                    weights=None,
                    seed=recipe.seed,
                    vocab_size=base.spec.vocab_size,
                )
            )
    ids, real = padded([row for text in texts for row in text.ids_ST.tolist()])
    labels_S = torch.tensor([expert for expert, text in enumerate(texts) for _ in text.ids_ST])
    labels_T = labels_S[:, None].expand_as(ids)[real]
    rows, told = {}, []
    for layer, states in enumerate(layer_states(base, ids, "ffn_input", dtype, "texts", progress)):
        x_TH = states.flatten(0, 1) if bool(real.all()) else states[real]  # a view if no sequence is shorter
        rows[layer], measured = fit_layer(x_TH.float(), labels_T, len(texts), layer)
        told.append(measured)
    facts = {"texts": [text.facts for text in texts], "router_fit": told}
    return TextRouter(rows, facts, tuple(dict.fromkeys(line for text in texts for line in text.warnings)))


def fit_layer(
    x_TH: torch.Tensor, labels_T: torch.Tensor, num_experts: int, layer: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the rows of a layer, float32 ``[N, H]``, and what they reach on held-out tokens; see `fit_text_router`.

    Args:
        x_TH: Inputs of the FFN.
        labels_T: The expert of each token, tokens of an expert in the order of its text.
        num_experts: N.
        layer: For messages.

    Raises:
        LlamaMoeError: An input is NaN or infinite.
    """
    held_T = _held_out(labels_T, num_experts)
    counts_N = torch.bincount(labels_T[~held_T], minlength=num_experts).double()
    weights_T = (1 / counts_N)[labels_T] / num_experts
    hidden = x_TH.shape[1]
    gram_HH, cross_HN = (torch.zeros(hidden, columns, dtype=torch.float64) for columns in (hidden, num_experts))
    for index_B in torch.split((~held_T).nonzero().flatten(), _ROWS):
        x_BH, label_B = x_TH[index_B].double(), labels_T[index_B]
        weighted_HB = (x_BH * weights_T[index_B, None]).T
        gram_HH += weighted_HB @ x_BH
        cross_HN += weighted_HB @ (torch.nn.functional.one_hot(label_B, num_experts) - 1 / num_experts).double()
    check_finite(layer, gram_HH, cross_HN)
    rows_NH = solve_ridge(gram_HH, cross_HN, _RIDGE * float(gram_HH.diagonal().mean()) + 1e-30).T
    held = torch.split(held_T.nonzero().flatten(), _ROWS)
    logits_TN, labels = torch.cat([x_TH[index_B].double() @ rows_NH.T for index_B in held]), labels_T[held_T]
    scale = _best_scale(logits_TN, labels, weights_T[held_T])
    loss = _cross_entropy(scale * logits_TN, labels, weights_T[held_T])
    right = (logits_TN.argmax(1) == labels).double()
    shares = [float(right[labels == expert].mean()) for expert in range(num_experts)]
    return (scale * rows_NH).float(), {"held_out_loss": loss, "held_out_accuracy": sum(shares) / num_experts}


def _held_out(labels_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return True for the last fifth of each expert's tokens."""
    counts_N = torch.bincount(labels_T, minlength=num_experts)
    place_T = torch.arange(len(labels_T)) - (counts_N.cumsum(0) - counts_N)[labels_T]
    return place_T >= (counts_N - counts_N // _HELD_OUT)[labels_T]


def _cross_entropy(logits_TN: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor) -> float:
    losses_T = torch.nn.functional.cross_entropy(logits_TN, labels_T, reduction="none")
    return float((losses_T * weights_T).sum() / weights_T.sum())


def _best_scale(logits_TN: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor) -> float:
    """Return the factor of least cross-entropy by golden-section search: the loss is convex in it."""
    low, high = _SCALES

    def loss(power: float) -> float:
        return _cross_entropy(math.exp(power) * logits_TN, labels_T, weights_T)

    for _ in range(_STEPS):
        one, other = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(one) < loss(other):
            high = other
        else:
            low = one
    return math.exp((low + high) / 2)
