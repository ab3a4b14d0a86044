"""The activation rate on a layer where it is known."""

from __future__ import annotations

import numpy as np
import torch

from llamamoe.methods.layer import FfnWeights
from llamamoe.methods.selectors import SELECTORS
from llamamoe.methods.selectors.rate import Rate
from tests.methods.splitters.calibrated import layer_context, layer_inputs, random_ffn, random_inputs


def one_neuron_per_token() -> tuple[FfnWeights, torch.Tensor]:
    """Neuron j answers to direction j alone, with a size that says nothing; direction 2 is the most frequent, then 0."""
    eye = torch.eye(4)
    sizes = torch.tensor([1.0, 50.0, 0.1, 1.0])[:, None]
    x = eye[[2, 2, 2, 2, 2, 0, 0, 0, 3, 3]] * torch.linspace(1, 9, 10)[:, None]
    return FfnWeights(eye * sizes, eye * sizes, eye, torch.ones(4)), x


def test_known_rates() -> None:
    ffn, x = one_neuron_per_token()
    context = layer_context(layer_inputs(x), 1)
    selector = Rate(Rate.Options(k_act=1))
    assert selector.scores(ffn, context).tolist() == [0.3, 0.0, 0.5, 0.2]
    assert selector.select(ffn, 2, context).tolist() == [0, 2]


def test_without_normalising_large_tokens_and_neurons_win() -> None:
    ffn, x = one_neuron_per_token()
    x = x + 0.3
    context = layer_context(layer_inputs(x), 1)
    normalised, plain = (Rate(Rate.Options(k_act=1, normalised=flag)).scores(ffn, context) for flag in (True, False))
    assert normalised[1] == 0
    assert plain[1] == 1, "a thousand times the weights"


def test_batch_size_changes_nothing() -> None:
    scores = [
        Rate(Rate.Options(k_act=3, max_tokens=20)).scores(
            random_ffn(), layer_context(random_inputs(tokens=50, batch_tokens=batch), 6)
        )
        for batch in (4096, 50, 7, 1)
    ]
    assert all(np.array_equal(scores[0], other) for other in scores[1:])
    assert scores[0].sum() * 17 == 3 * 17, "k_act neurons of every third token"


def test_registered() -> None:
    assert SELECTORS.get("rate") is Rate
    assert Rate.needs == "activations"
    assert Rate().options == Rate.Options(k_act=10, normalised=True, max_tokens=65536)
