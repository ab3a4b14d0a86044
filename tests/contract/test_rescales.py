"""Every rescale: a coefficient that follows from N and k, and one that is not another's under a new name."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest

import llamamoe
from llamamoe.architectures.moe_layout import weight
from llamamoe.architectures.rescales import RESCALES
from tests.dense import FFN_TARGETS, make_dense, variant_for

SIZES = [(n, k) for n in (2, 5, 8, 64) for k in range(1, n + 1) if k in (1, 2, 3, 24, n)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rescales")
    return {v: make_dense(folder / v, v, num_hidden_layers=1) for v in sorted(set(map(variant_for, FFN_TARGETS)))}


@pytest.mark.parametrize("name", RESCALES.names())
def test_a_positive_number_that_sizes_alone_decide(name: str) -> None:
    for size in SIZES:
        found = RESCALES.get(name)().coefficient(*size)
        assert isinstance(found, float)
        assert math.isfinite(found)
        assert found > 0
        assert found == RESCALES.get(name)().coefficient(*size)


@pytest.mark.parametrize("name", RESCALES.names())
def test_it_is_exact_with_all_experts_or_says_that_it_is_not(name: str) -> None:
    exact = all(RESCALES.get(name)().coefficient(n, n) == 1.0 for n in (2, 5, 8, 64))
    assert exact != ("never exact" in (inspect.getdoc(RESCALES.get(name)) or ""))


@pytest.mark.parametrize("name", RESCALES.names())
def test_it_differs_from_every_other_unless_it_names_it(name: str) -> None:
    """Two rescales of one number must say so: the docstring of one names the other."""
    mine = [RESCALES.get(name)().coefficient(*size) for size in SIZES]
    for other in RESCALES:
        if other.name != name and [other().coefficient(*size) for size in SIZES] == mine:
            pair = (RESCALES.get(name), other)
            assert any(f"`{b.__name__}`" in (a.__doc__ or "") for a, b in (pair, pair[::-1])), other.name


@pytest.mark.parametrize("target", FFN_TARGETS)
@pytest.mark.parametrize("name", RESCALES.names())
def test_every_target_gives_a_selected_expert_that_coefficient(
    sources: dict[str, Path], name: str, target: str
) -> None:
    """Return the weights of the target's router at equal logits, times its factors."""
    given = {"method": "random", "num_experts": 8, "top_k": 3, "rescale": name, "target": target}
    source = sources[variant_for(target)]
    combine = llamamoe.plan_conversion(source, llamamoe.load_recipe(given=given)).layout.combine
    found = combine.factor * weight(combine.weighting, 8, 3)
    assert found == pytest.approx(RESCALES.get(name)().coefficient(8, 3), rel=1e-12)
