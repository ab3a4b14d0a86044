"""`llamamoe.budget`: budgets kept to the last router row, targets' limits, and recipes that `split` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llamamoe import budget
from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.architectures.targets import TARGETS
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.conversion.plan import plan_split
from llamamoe.conversion.recipe import SplitRecipe, build_recipe, load_recipe
from llamamoe.errors import RefusedError, UsageError
from llamamoe.studies.budget.budget import SIMULATED
from llamamoe.studies.budget.sensitivities import SENSITIVITIES
from llamamoe.studies.budget.sensitivities.base import Sensitivity, Task
from llamamoe.studies.budget.sensitivities.curves import Curves
from llamamoe.studies.budget.sizes import Sizer
from llamamoe.studies.sizes import ffn_share
from tests.dense import FFN_TARGETS, make_dense, variant_for

LAYERS = 5


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "dense"
    return make_dense(folder, num_hidden_layers=LAYERS, intermediate_size=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget-text") / "text.txt"
    letters = np.random.default_rng(0).integers(33, 120, 700)
    path.write_text("".join(map(chr, letters)), encoding="utf-8")
    return path


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A measure that finds what the test puts in: the damage of each layer at half of its FFN."""
    found: dict[str, Any] = {"damage": [1.0] * LAYERS}

    class Planted(Sensitivity):
        name, summary, unit, converts = "planted", "", "units", True

        def measure(self, task: Task) -> Curves:
            found["task"] = task
            return Curves(np.array([0.5]), np.array([found["damage"]]))

        def flops(self, task: Task) -> int:
            return 1

    monkeypatch.setitem(SENSITIVITIES._found, "planted", Planted)
    return found


def open_model(folder: Path) -> DenseModel:
    return understand(open_checkpoint(locate(folder)))


def recipe(text: Path | None = None, **keys: Any) -> SplitRecipe:
    given = {"method": "kmeans", "calibration_tokens": 512, "calibration_length": 32} | keys
    return build_recipe(given | ({"calibration": str(text)} if text else {}))


@pytest.mark.parametrize("target", FFN_TARGETS)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
def test_sizes_cost_what_the_plan_says_and_at_most_the_budget(target: str, budget: float, tmp_path: Path) -> None:
    variant = variant_for(target)
    folder = make_dense(tmp_path / "dense", variant, intermediate_size=512, num_hidden_layers=1)
    model = open_model(folder)
    sizer = Sizer(model, recipe(target=target), 0.5)
    sizes = sizer.fit(TARGETS.get(target)(), budget)
    plan = plan_split(model, sizer.recipe_for(TARGETS.get(target)(), sizes, ()))
    assert sizes.share == pytest.approx(ffn_share(plan), rel=1e-12)
    assert budget - 0.08 < sizes.share <= budget + 1e-9
    assert plan.layout.expert_width == sizes.expert_width
    assert (sizes.shared == 0) == (TARGETS.get(target).shared in ("none", "one"))


def test_what_the_recipe_gives_is_kept(dense: Path) -> None:
    sizer = Sizer(open_model(dense), recipe(num_experts=12, shared=64), 0.5)
    for share in (0.4, 0.6):
        sizes = sizer.fit(TARGETS.get("qwen2_moe")(), share)
        assert sizes.num_experts == 12
        assert abs(sizes.shared - 64) <= 32, "near it, to fill the budget"


def test_a_layer_that_loses_much_stays_dense_within_the_budget(
    dense: Path, text: Path, planted: dict[str, Any]
) -> None:
    planted["damage"] = [50.0, 1.0, 1.0, 1.2, 1.0]
    found = budget(dense, recipe(text), 0.5, measure="planted")
    assert found.keep_dense == (0,)
    assert found.dense_form == "any"
    plan = plan_split(open_model(dense), found.recipe)
    assert plan.layout.dense_layers == (0,)
    assert plan.target.name == found.target
    assert found.active_share == pytest.approx(ffn_share(plan))
    assert 0.42 < found.active_share <= 0.5 + 1e-9
    assert found.damage < found.damage_uniform
    assert [len(each["layers"]) for each in found.by_count] == list(range(len(found.by_count)))
    assert found.damage == min(each["damage"] for each in found.by_count)
    assert found.damage_uniform == found.by_count[0]["damage"]
    assert found.damage == pytest.approx(sum(layer.damage for layer in found.layers))
    assert found.damage_uniform == pytest.approx(sum(layer.damage_uniform for layer in found.layers))
    assert [layer.dense for layer in found.layers] == [True, False, False, False, False]
    layout = plan.layout
    sizes = (found.num_experts, found.top_k, found.expert_width, found.shared)
    assert sizes == (layout.num_experts, layout.top_k, layout.expert_width, layout.num_shared)


def test_layers_that_are_alike_are_converted_alike(dense: Path, text: Path, planted: dict[str, Any]) -> None:
    found = budget(dense, recipe(text), 0.5, measure="planted")
    assert found.keep_dense == ()
    assert found.damage == pytest.approx(found.damage_uniform)
    task = planted["task"]
    assert len(task.plans) == 2
    assert task.shares == pytest.approx([ffn_share(plan) for plan in task.plans])
    assert task.shares[0] < 0.375 + 1e-9 < task.shares[1] <= 0.5 + 1e-9
    assert not any(plan.layout.dense_layers for plan in task.plans)


@pytest.mark.parametrize(("target", "layers"), [("glm4_moe", ()), ("granitemoeshared", ()), ("ernie4_5_moe", (4,))])
def test_the_target_decides_which_layers_can_stay_dense(
    dense: Path, text: Path, planted: dict[str, Any], target: str, layers: tuple[int, ...]
) -> None:
    planted["damage"] = [1.0, 1.0, 1.0, 1.0, 50.0]
    found = budget(dense, recipe(text, target=target), 0.5, measure="planted")
    assert found.keep_dense == layers
    assert found.target == target
    assert any("no dense layers" in w for w in found.warnings) == (target == "granitemoeshared")


def test_other_numbers_of_shared_neurons_are_simulated(dense: Path, text: Path, planted: dict[str, Any]) -> None:
    planted["damage"] = [1.0, 8.0, 1.0, 1.0, 1.0]
    found = budget(dense, recipe(text), 0.5, measure="planted").to_json()
    simulated = found["simulated"]
    assert simulated["note"] == SIMULATED
    assert simulated["per_layer_shared"] == [layer["simulated_shared"] for layer in found["layers"]]
    assert simulated["per_layer_shared"][1] == max(simulated["per_layer_shared"])
    assert simulated["damage"] <= found["damage_uniform"] + 1e-9
    json.dumps(found, allow_nan=False)


def test_the_recipe_file_is_read_back_as_it_is(
    dense: Path, text: Path, planted: dict[str, Any], tmp_path: Path
) -> None:
    planted["damage"] = [50.0, 1.0, 1.0, 1.0, 1.0]
    found = budget(dense, recipe(text), 0.5, measure="planted")
    (tmp_path / "half.yaml").write_text(found.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "half.yaml")
    assert again == found.recipe
    assert plan_split(open_model(dense), again).layout.dense_layers == (0,)
    assert yaml.safe_load(found.to_yaml())["keep_dense"] == [0]


def test_the_proxy_from_text_to_allocation(dense: Path, text: Path) -> None:
    found = budget(dense, recipe(text), 0.5)
    assert found.active_share <= 0.5 + 1e-9
    assert found.damage <= found.damage_uniform
    assert all(layer.damage_uniform > 0 for layer in found.layers)


def test_a_budget_that_is_too_small_names_the_smallest_that_is_not(dense: Path) -> None:
    sizer = Sizer(open_model(dense), recipe(), 0.5)
    with pytest.raises(RefusedError, match=r"0\.03 is too small .* smallest possible one is (0\.\d+)") as caught:
        sizer.targets(0.03)
    least = float(str(caught.value).split("possible one is ")[1].split(" ")[0])
    assert sizer.targets(least)
    assert 0.03 < least < 0.3


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({"method": "static", "shared": 0.5}, {}, "static makes no experts"),
        ({"method": "upcycle"}, {}, "upcycle makes copies"),
        ({"shared": "2x"}, {}, "2x"),
        ({}, {"budget": 1.5}, "between 0 and 1"),
        ({}, {"budget": float("nan")}, "between 0 and 1"),
        ({}, {"shared_of_active": 1.0}, "shared_of_active"),
        ({}, {"points": 0}, "points"),
        ({}, {"held_out_tokens": 1}, "held_out_tokens"),
        ({}, {"measure": "proxi"}, "unknown measure 'proxi'"),
        ({"target": "mixtral", "shared": 0.25}, {}, "mixtral has no shared expert"),
        ({"target": "qwen3_moe"}, {}, "RMSNorm"),
        ({"align": {"tokens": 4096}}, {}, "aligns all layers together"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    dense: Path, keys: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    arguments = {"budget": 0.5} | arguments
    with pytest.raises((RefusedError, UsageError), match=message):
        budget(dense, recipe(Path("/there/is/no/text.txt"), **keys), arguments.pop("budget"), **arguments)


def test_text_is_needed(dense: Path) -> None:
    with pytest.raises(UsageError, match="none is given"):
        budget(dense, recipe(), 0.5)
