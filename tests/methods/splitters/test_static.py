"""Static pruning keeps the neurons of highest power, and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.methods.selectors.power import Power
from llamamoe.methods.splitters.static import Static
from tests.methods.splitters.calibrated import layer_context, plain_hidden, random_ffn, random_inputs


@given(st.integers(2, 40), st.floats(0, 1), st.integers(0, 9))
def test_every_neuron_is_kept_or_omitted(size: int, share: float, seed: int) -> None:
    kept = np.sort(np.random.default_rng(seed).permutation(size)[: max(1, round(share * size))])
    partition = Static().split(random_ffn(size, 4), kept, layer_context(None, 0, 0, 0))
    partition.check(size)
    assert np.array_equal(partition.shared, kept)
    assert partition.experts.shape == (0, 0)
    assert np.array_equal(np.sort(np.concatenate([partition.omitted, kept])), np.arange(size))


def test_by_default_the_neurons_of_most_power_stay() -> None:
    """Mean square of what a neuron adds to the output, written out."""
    ffn, inputs = random_ffn(24, 8), random_inputs(60)
    context = layer_context(inputs, 0, 0, 0)
    assert Static.default_shared_by == Power.name
    partition = Static().split(ffn, Power().select(ffn, 12, context), context)
    hidden = plain_hidden(ffn, inputs.x_TH)
    down = ffn.down_HF.double().numpy()
    power = [np.mean([np.sum((h * down[:, j]) ** 2) for h in hidden[:, j]]) for j in range(24)]
    assert np.array_equal(partition.shared, np.sort(np.argsort(power)[-12:]))
