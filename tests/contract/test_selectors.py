"""Every selector: the form of its scores, what decides them, and that it chooses as no other does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llamamoe.methods.layer import FfnWeights, LayerInputs
from llamamoe.methods.selectors import SELECTORS

from .world import World, check_needs, digest, disturb, made, shown, variants

CASES = [(name, each) for name in SELECTORS.names() for each in variants(SELECTORS.get(name))]


def scores(world: World, name: str, options: dict[str, Any] | None = None, **keys: Any) -> np.ndarray:
    found: np.ndarray = made(SELECTORS.get(name), options).scores(world.ffn, world.context(4, 2, 43, **keys))
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_form_and_determinism(world: World, name: str, options: dict[str, Any]) -> None:
    before = digest(world.inputs.x_TH, world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF)
    first = scores(world, name, options)
    disturb()
    scores(world, name, options, inputs=world.part(2), seed=5)
    assert digest(first) == digest(scores(world, name, options))
    assert (first.dtype, first.shape) == (np.float64, (172,))
    assert np.isfinite(first).all()
    assert before == digest(world.inputs.x_TH, world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF)


@pytest.mark.parametrize("count", [0, 1, 43, 172])
@pytest.mark.parametrize("name", SELECTORS.names())
def test_the_highest_scores_are_selected(world: World, name: str, count: int) -> None:
    chosen = made(SELECTORS.get(name)).select(world.ffn, count, world.context(4, 2, 43))
    found = scores(world, name)
    assert (chosen.dtype, chosen.shape) == (np.int64, (count,))
    assert (np.diff(chosen) > 0).all()
    rest = np.setdiff1d(np.arange(172), chosen)
    assert not count or not len(rest) or found[chosen].min() >= found[rest].max()


@pytest.mark.parametrize("name", SELECTORS.names())
def test_it_looks_at_what_it_needs_and_at_nothing_else(world: World, name: str) -> None:
    needs = SELECTORS.get(name).needs

    def result(ffn: FfnWeights, inputs: LayerInputs) -> str:
        context = shown(world.context(4, 2, 43, inputs=inputs), needs)
        return digest(made(SELECTORS.get(name)).scores(ffn, context))

    check_needs(needs, result, world.ffn, world.inputs, world.other)


@pytest.mark.parametrize("name", SELECTORS.names())
def test_it_chooses_as_no_other_does(world: World, name: str) -> None:
    """A quarter of the neurons: not those of any other selector, nor the first ones."""
    chosen = {n: made(SELECTORS.get(n)).select(world.ffn, 43, world.context(4, 2, 43)).tolist() for n in SELECTORS.names()}  # fmt: skip
    assert [other for other in chosen if chosen[other] == chosen[name]] == [name]
    assert chosen[name] != list(range(43))


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in CASES if o])
def test_every_choice_of_words_has_an_effect(world: World, name: str, options: dict[str, Any]) -> None:
    assert digest(scores(world, name, options)) != digest(scores(world, name))
