"""Every mixture update: weights that are weights, what decides them, and that they move."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llamamoe.training.mixtures.updates import MIXTURES

from .world import disturb, made, variants

NAMES = MIXTURES.names()
CASES = [(name, each) for name in NAMES for each in variants(MIXTURES.get(name))]
WEIGHTS = {"arxiv": 0.2, "book": 0.3, "off": 0.0, "c4": 0.5}
LOSSES = {"arxiv": 2.9, "book": 2.2, "c4": 1.8}
AIM = {"arxiv": 1.5, "book": 2.25, "c4": 2.0}


def update(name: str, options: dict[str, Any] | None = None, losses: dict[str, float] = LOSSES, aim: dict[str, float] = AIM) -> dict[str, float]:  # fmt: skip
    found: dict[str, float] = made(MIXTURES.get(name), options).update(WEIGHTS, losses, aim)
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_form_and_determinism(name: str, options: dict[str, Any]) -> None:
    before = dict(WEIGHTS), dict(LOSSES), dict(AIM)
    first = update(name, options)
    disturb()
    assert first == update(name, options)
    assert list(first) == list(WEIGHTS)
    assert math.fsum(first.values()) == pytest.approx(1, abs=1e-12)
    assert all(type(weight) is float and weight >= 0 for weight in first.values())
    assert first["off"] == 0, "a domain that is not trained on stays so"
    assert all(first[domain] > 0 for domain in LOSSES)
    assert before == (WEIGHTS, LOSSES, AIM)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_domains_does_not_matter(name: str) -> None:
    turned = made(MIXTURES.get(name)).update(dict(reversed(WEIGHTS.items())), LOSSES, AIM)
    assert turned == pytest.approx(update(name), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_it_moves_the_weights_if_it_is_dynamic(name: str) -> None:
    """By more than rounding, toward the domain that lags behind most; a static one ignores the losses."""
    found, dynamic = update(name), MIXTURES.get(name).dynamic
    assert (max(abs(found[d] - WEIGHTS[d]) for d in WEIGHTS) > 0.01) == dynamic
    assert (found["arxiv"] > WEIGHTS["arxiv"]) == dynamic
    assert (update(name, losses=LOSSES | {"book": 9.0}) != found) == dynamic
    assert (update(name, aim=AIM | {"arxiv": 0.5}) != found) == dynamic


@pytest.mark.parametrize("name", NAMES)
def test_it_moves_them_as_no_other_does(name: str) -> None:
    assert [other for other in NAMES if update(other) == update(name)] == [name]
