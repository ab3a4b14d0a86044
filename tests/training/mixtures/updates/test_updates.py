"""Every update rule against its formula, and what all of them promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.errors import LlamaMoeError, UsageError
from llamamoe.training.mixtures.updates import MIXTURES

NAMES = ("arxiv", "book", "c4", "off")
WEIGHTS = {"arxiv": 0.2, "book": 0.3, "c4": 0.5, "off": 0.0}
LOSSES = {"arxiv": 1.9, "book": 2.2, "c4": 2.0}
REFERENCE = {"arxiv": 1.5, "book": 2.25, "c4": 2.0}


def update(name: str, **options: float) -> dict[str, float]:
    plugin = MIXTURES.get(name)
    return plugin(plugin.Options(**options)).update(WEIGHTS, LOSSES, REFERENCE)


def test_static():
    assert update("static") == WEIGHTS
    plugin = MIXTURES.get("static")
    assert plugin().update({"a": 3.0, "b": 1.0}, {}, {}) == {"a": 0.75, "b": 0.25}
    assert not plugin.dynamic


@pytest.mark.parametrize(("eta", "c"), [(1.0, 1e-4), (2.5, 0.3), (0.1, 0.0)])
def test_sheared_llama(eta, c):
    alpha = {n: math.exp(math.log(WEIGHTS[n]) + eta * (LOSSES[n] - REFERENCE[n])) for n in LOSSES}
    total = sum(alpha.values())
    want = {n: (1 - c) * alpha[n] / total + c / 3 for n in alpha} | {"off": 0.0}
    assert update("sheared_llama", eta=eta, smoothing=c) == pytest.approx(want, rel=1e-14)
    if (eta, c) == (1.0, 1e-4):
        assert update("sheared_llama") == update("sheared_llama", eta=eta, smoothing=c), "the published values"


def test_sheared_llama_paper():
    alpha = {n: WEIGHTS[n] * math.exp(max(0.0, LOSSES[n] - REFERENCE[n])) for n in LOSSES}
    want = {n: alpha[n] / sum(alpha.values()) for n in alpha} | {"off": 0.0}
    assert update("sheared_llama_paper") == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("name", MIXTURES.names())
@given(data=st.data(), count=st.integers(1, 9))
@settings(max_examples=40)
def test_sum_one_and_positive(name, data, count):
    names = [f"d{i}" for i in range(count)]
    positive = st.lists(st.floats(1e-3, 1), min_size=count, max_size=count)
    losses = st.lists(st.floats(0, 12), min_size=count, max_size=count)
    weights, now, aim = (dict(zip(names, data.draw(each), strict=True)) for each in (positive, losses, losses))
    new = MIXTURES.get(name)().update(weights, now, aim)
    assert math.fsum(new.values()) == pytest.approx(1, abs=1e-12)
    assert all(weight > 0 for weight in new.values())
    assert list(new) == names


@pytest.mark.parametrize("name", [n for n in MIXTURES.names() if MIXTURES.get(n).dynamic])
def test_who_lags_behind_gets_more(name):
    new = MIXTURES.get(name)().update(WEIGHTS, REFERENCE | {"book": 3.0}, REFERENCE)
    assert new["book"] > WEIGHTS["book"]
    assert new["arxiv"] < WEIGHTS["arxiv"]
    same = MIXTURES.get(name)().update(WEIGHTS, REFERENCE, REFERENCE)
    assert same == pytest.approx(WEIGHTS, abs=1e-4)


@pytest.mark.parametrize("name", [n for n in MIXTURES.names() if MIXTURES.get(n).dynamic])
def test_losses_that_cannot_be_used(name):
    rule = MIXTURES.get(name)()
    with pytest.raises(UsageError, match="needs the loss of the domain 'book'"):
        rule.update(WEIGHTS, {"arxiv": 1.0, "c4": 1.0}, REFERENCE)
    with pytest.raises(UsageError, match="needs the reference loss of the domain 'c4'"):
        rule.update(WEIGHTS, LOSSES, {"arxiv": 1.0, "book": 1.0})
    with pytest.raises(LlamaMoeError, match="is nan"):
        rule.update(WEIGHTS, LOSSES | {"c4": math.nan}, REFERENCE)


def test_options_are_checked():
    options = MIXTURES.get("sheared_llama").Options
    for wrong in ({"eta": 0}, {"smoothing": 1}, {"c": 1}, {"eta": math.inf}):
        with pytest.raises(ValueError, match="1 validation error"):
            options(**wrong)


def test_huge_differences_do_not_overflow():
    rule = MIXTURES.get("sheared_llama")()
    new = rule.update({"a": 0.5, "b": 0.5}, {"a": 5000.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert new["a"] == pytest.approx(1 - 0.5e-4)
    assert np.isfinite(list(new.values())).all()
