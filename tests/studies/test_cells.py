"""Cells of a study, and their cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamamoe.errors import RefusedError, UsageError
from llamamoe.studies.cells import SIMULATED, SIMULATED_K, Cell, cells_of, select
from llamamoe.studies.sizes import ffn_share
from tests.dense import make_dense

from .common import REPAIRED, make_study, open_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("models") / "dense")


def cells(dense: Path, folder: Path, **keys: object) -> list[Cell]:
    return cells_of(make_study(folder, **keys), open_dense(dense))


def test_controls_stand_beside_the_methods(dense: Path, tmp_path: Path) -> None:
    found = cells(dense, tmp_path, budgets=[0.5, 0.25], seeds={0.5: [3, 4], 0.25: [3]})
    by_method: dict[str, list[tuple[float | None, int | None]]] = {}
    for cell in found:
        by_method.setdefault(cell.method, []).append((cell.budget, cell.seed))
    assert found[0].label == "dense"
    once, every = [(0.5, 3), (0.25, 3)], [(0.5, 3), (0.25, 3), (0.5, 4)]
    assert by_method == {
        "dense": [(None, None)],
        "kmeans": every,
        "kmeans, oracle router": once,
        "repaired": every,
        "repaired, oracle router": once,
        "static": once,
        "static + least_squares": once,
        "random": every,
    }
    for cell in found:
        assert cell.simulated == (SIMULATED if "oracle" in cell.method else None)
        assert cell.kind == (
            "dense" if cell.plan is None else "method" if cell.method in ("kmeans", "repaired") else "control"
        )
    assert [cell.seed for cell in found[1:]] == sorted(cell.seed or 0 for cell in found[1:]), "first seeds first"


def test_without_controls_or_text(dense: Path, tmp_path: Path) -> None:
    assert [c.method for c in cells(dense, tmp_path, controls=False, methods=["kmeans"])] == ["dense", "kmeans"]
    found = cells(dense, tmp_path, methods=["kmeans"], calibration=[])
    assert {c.method for c in found} == {"dense", "kmeans", "kmeans, oracle router", "random"}, "pruning needs text"


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "granite"])
def test_cost_is_within_the_budget_whatever_the_target_adds(variant: str, tmp_path: Path) -> None:
    model = make_dense(tmp_path / "dense", variant)
    for cell in cells(model, tmp_path, budgets=[0.4, 0.75]):
        if cell.plan is None:
            continue
        assert cell.budget is not None
        spec = cell.plan.model.spec
        assert cell.share <= cell.budget + 1e-9
        assert cell.share > cell.budget - 0.15, cell.label
        # counted again from the tensors to write: three matrices of the dense FFN a layer
        used = 0.0
        for tensor in cell.plan.tensors:
            if tensor.role in ("router", "routed", "shared", "stub", "dense_ffn") and len(tensor.shape) > 1:
                size = 1
                for n in tensor.shape:
                    size *= n
                routed = cell.plan.layout.top_k / (cell.plan.layout.num_experts or 1)
                used += size * (routed if tensor.role == "routed" else 1)
        whole = 3 * spec.hidden_size * spec.intermediate_size * spec.num_layers
        assert ffn_share(cell.plan) == pytest.approx(used / whole, abs=1e-3)


def test_static_keeps_as_much_as_the_budget_allows(dense: Path, tmp_path: Path) -> None:
    (static,) = [c for c in cells(dense, tmp_path) if c.method == "static"]
    assert static.plan is not None
    assert static.plan.layout.num_shared == 172 // 2
    assert static.plan.target.name == "dense"


def test_each_repair_has_its_static_control(dense: Path, tmp_path: Path) -> None:
    other = {**REPAIRED, "name": "other", "repair": {"name": "least_squares", "ridge": 0.5}}
    scalar = {**REPAIRED, "name": "third", "repair": "scalar"}
    found = cells(dense, tmp_path, methods=[REPAIRED, other, scalar, {**REPAIRED, "name": "again"}])
    static = [c for c in found if c.method.startswith("static")]
    assert [c.method for c in static] == [
        "static", "static + least_squares", "static + least_squares 2", "static + scalar",
    ]  # fmt: skip
    repairs = [c.plan.recipe.repair for c in static if c.plan]
    assert [r.name for r in repairs if r] == ["none", "least_squares", "least_squares", "scalar"]


def test_each_alignment_has_its_static_control(dense: Path, tmp_path: Path) -> None:
    aligned = {**REPAIRED, "name": "aligned", "align": {"tokens": 2048}}
    longer = {**REPAIRED, "name": "longer", "align": {"tokens": 4096}}
    found = cells(dense, tmp_path, methods=[aligned, longer, {**aligned, "name": "again"}])
    static = {c.method: c.plan.recipe for c in found if c.method.startswith("static") and c.plan}
    aligns = {name: recipe.align and recipe.align.tokens for name, recipe in static.items()}
    assert aligns == {
        "static": None,
        "static + least_squares": None,
        "static + least_squares + align": 2048,
        "static + least_squares + align 2": 4096,
    }
    repairs = {name: recipe.repair.name for name, recipe in static.items() if recipe.repair}
    assert repairs == {name: "none" if name == "static" else "least_squares" for name in static}


def test_a_k_for_each_layer_is_simulated_beside_its_method(dense: Path, tmp_path: Path) -> None:
    method = {**REPAIRED, "top_k_by_layer": "proxy"}
    found = cells(dense, tmp_path, methods=[method, {**method, "name": "plain", "top_k_by_layer": None}], seeds=[0, 1])
    ours = [c for c in found if c.by_layer]
    assert [c.label for c in ours] == ["repaired, k by layer/0.5/0", "repaired, k by layer/0.5/1"]
    for cell in ours:
        (base,) = [c for c in found if c.label == cell.label.replace(", k by layer", "")]
        assert (cell.plan, cell.share, cell.simulated, base.simulated) == (base.plan, base.share, SIMULATED_K, None)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"top_k_by_layer": "prox"}, r"unknown measure 'prox'\. Did you mean 'proxy'"),
        ({"top_k_by_layer": "kl", "align": {"tokens": 2048}}, "one layer at a time, so align is not possible"),
        ({"top_k_by_layer": "kl", "keep_dense": [0]}, "one layer at a time, so keep_dense is not possible"),
        ({"top_k_by_layer": "kl", "method": "static"}, "static has no experts"),
    ],
)
def test_a_k_for_each_layer_is_refused_in_the_recipe(keys: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        make_study(tmp_path, methods=[{**REPAIRED, **keys}])


def test_a_k_for_each_layer_needs_text(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"mine at 0\.5: top_k_by_layer measures layers on calibration text"):
        cells(dense, tmp_path, methods=[{"name": "mine", "method": "kmeans", "top_k_by_layer": "proxy"}])


def test_given_sizes_are_taken_or_refused(dense: Path, tmp_path: Path) -> None:
    sizes = {0.5: {"num_experts": 4, "top_k": 1, "shared": 44}}
    method = {"name": "mine", "method": "kmeans", "sizes": sizes}
    found = [c for c in cells(dense, tmp_path, methods=[method], controls=False) if c.plan]
    assert [(c.plan.layout.top_k, c.plan.layout.num_shared) for c in found if c.plan] == [(1, 44)]
    method["sizes"] = {0.5: {"num_experts": 4, "top_k": 3, "shared": 44}}
    with pytest.raises(RefusedError, match=r"mine at 0.5: the given sizes cost 0\.\d+ .* exceeds the budget"):
        cells(dense, tmp_path, methods=[method], controls=False)


def test_one_reason_for_many_budgets_is_told_once_a_method(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as error:
        cells(dense, tmp_path, methods=[REPAIRED], budgets=[0.75, 0.5, 0.25], calibration=[])
    text = str(error.value)
    assert "repaired at 0.75, 0.5, 0.25: calibration text is needed by" in text
    assert text.count("calibration text is needed by") == 1


def test_impossible_budgets_are_named_all_at_once_with_the_smallest(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as error:
        cells(dense, tmp_path, budgets=[0.01, 0.02])
    text = str(error.value)
    assert "kmeans at 0.01" in text
    assert "repaired at 0.02" in text
    assert "smallest budget is 0." in text


def test_select(dense: Path, tmp_path: Path) -> None:
    found = cells(dense, tmp_path)
    assert select(found, []) == found
    assert [c.label for c in select(found, ["kmeans"])] == ["kmeans/0.5/0"]
    assert {c.method for c in select(found, ["kmeans*", "dense"])} == {"dense", "kmeans", "kmeans, oracle router"}
    with pytest.raises(UsageError, match="Did you mean 'kmeans'"):
        select(found, ["kmeens/0.5/0"])
