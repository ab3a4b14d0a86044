"""Curves of damage: power laws in what is left out, through the measured points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.studies.budget.sensitivities.curves import DEFAULT_EXPONENT, EXPONENTS, Curves


def curves(shares: list[float], damage: list[list[float]]) -> Curves:
    return Curves(np.array(shares), np.array(damage, dtype=float))


@given(st.floats(0.01, 0.99), st.floats(0.6, 3.9), st.floats(1e-3, 10))
def test_a_power_law_is_found_again_everywhere(share: float, exponent: float, size: float) -> None:
    shares = [0.3, 0.4, 0.7]
    found = curves(shares, [[size * (1 - b) ** exponent] for b in shares])
    np.testing.assert_allclose(found.at(share), [size * (1 - share) ** exponent], rtol=1e-9)


def test_one_point_is_extended_with_the_default_exponent() -> None:
    found = curves([0.5], [[1.0, 4.0]])
    np.testing.assert_allclose(found.at(0.75), np.array([1.0, 4.0]) * 0.5**DEFAULT_EXPONENT)
    np.testing.assert_allclose(found.at(0.5), [1.0, 4.0])


def test_measured_points_are_kept_and_lines_between_are_straight_in_log_log() -> None:
    shares, damage = [0.2, 0.5, 0.8], [[5.0], [3.0], [0.1]]
    found = curves(shares, damage)
    for share, (value,) in zip(shares, damage, strict=True):
        np.testing.assert_allclose(found.at(share), value)
    x = np.log([0.8, 0.65, 0.5])
    slope = (np.log(3.0) - np.log(5.0)) / (x[2] - x[0])
    np.testing.assert_allclose(found.at(0.35), np.exp(np.log(5.0) + slope * (x[1] - x[0])))


def test_beyond_the_points_exponents_are_bounded() -> None:
    steep = curves([0.5, 0.52], [[1.0], [0.01]])
    np.testing.assert_allclose(steep.at(0.25), [1.5 ** EXPONENTS[1]])
    flat = curves([0.4, 0.5], [[1.0], [1.0]])
    np.testing.assert_allclose(flat.at(0.75), [0.5 ** EXPONENTS[0]])


def test_damage_never_grows_with_the_share_and_ends_at_zero() -> None:
    found = curves([0.25, 0.5, 0.75], [[1.0, 0.0], [2.0, 0.0], [0.5, 1.0]])
    values = np.array([found.at(b) for b in np.linspace(0.05, 1.0, 40)])
    assert (np.diff(values, axis=0) <= 1e-12).all()
    assert values[-1].tolist() == [0.0, 0.0]
    assert found.at(0.25)[0] == pytest.approx(2.0), "the larger one is taken for both"
    assert curves([0.5], [[0.0, 0.0]]).at(0.2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("shares", "damage"),
    [([0.5, 0.4], [[1.0], [1.0]]), ([0.0], [[1.0]]), ([1.0], [[1.0]]), ([0.5], [[-1.0]]), ([0.5], [[float("nan")]]),
     ([0.5], [[1.0], [1.0]])],
)  # fmt: skip
def test_what_makes_no_curve_is_refused(shares: list[float], damage: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"ascend|damage"):
        curves(shares, damage)


def test_no_point_makes_no_curve() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Curves(np.array([]), np.zeros((0, 2)))
