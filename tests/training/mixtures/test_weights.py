"""Weights by name."""

from __future__ import annotations

import math

import pytest

from llamamoe.data.text import REDPAJAMA_DOMAINS
from llamamoe.errors import UsageError
from llamamoe.training.mixtures.weights import PUBLISHED, mixture_weights

TOKENS = dict.fromkeys(sorted(REDPAJAMA_DOMAINS.values()), 100)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama", {"commoncrawl": 67, "c4": 15, "github": 4.5, "wikipedia": 4.5, "book": 4.5, "arxiv": 2.5,
                   "stackexchange": 2}),
        ("sheared_llama", {"commoncrawl": 36.1, "c4": 49.2, "github": 0.8, "wikipedia": 3.1, "book": 9.1,
                           "arxiv": 0.7, "stackexchange": 1.0}),
        ("uniform", dict.fromkeys(TOKENS, 100 / 7)),
    ],
)  # fmt: skip
def test_published_sets(name, published):
    warnings: list[str] = []
    weights = mixture_weights(name, TOKENS, warnings)
    assert weights == {domain: pytest.approx(published[domain] / 100, abs=1e-12) for domain in TOKENS}
    assert list(weights) == list(TOKENS)
    assert warnings == []


def test_every_published_set_is_complete():
    for weights in PUBLISHED.values():
        assert weights.keys() == TOKENS.keys()
        assert math.fsum(weights.values()) == pytest.approx(1)


def test_proportional_and_given():
    assert mixture_weights("proportional", {"a": 30, "b": 10}) == {"a": 0.75, "b": 0.25}
    warnings: list[str] = []
    assert mixture_weights({"b": 3, "a": 1}, {"a": 1, "b": 1, "c": 1}, warnings) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert warnings == ["no weight is given to c: nothing of that text is used"]


def test_domains_of_a_published_set_that_are_missing():
    warnings: list[str] = []
    weights = mixture_weights("llama", {"c4": 5, "book": 5, "mine": 5}, warnings)
    assert weights == {"c4": pytest.approx(0.15 / 0.195), "book": pytest.approx(0.045 / 0.195), "mine": 0.0}
    assert "the text has no arxiv, commoncrawl, github, stackexchange, wikipedia" in warnings[0]
    assert "no weight is given to mine" in warnings[1]


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        ("lama", "unknown mixture 'lama'", "Did you mean 'llama'"),
        ({"c5": 1.0}, "no domain 'c5'", "Did you mean 'c4'"),
        ({"c4": -1.0}, "is -1.0", ""),
        ({"c4": math.inf}, "is inf", ""),
        ({"c4": 0.0}, "All weights", ""),
        ({}, "All weights", ""),
    ],
)
def test_what_is_refused(wanted, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        mixture_weights(wanted, TOKENS)
    assert hint in (caught.value.hint or "")


def test_none_of_the_domains():
    with pytest.raises(UsageError, match="none of the domains of 'llama'"):
        mixture_weights("llama", {"tales": 5})
