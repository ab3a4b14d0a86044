"""Sizes that follow from measured speeds, and what speed a plan lets expect."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamamoe import RefusedError, UsageError, load_recipe, plan_conversion
from llamamoe.architectures.dense_checkpoint import understand
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.conversion import expected_speed, preference
from llamamoe.conversion.expected_speed import MeasuredShape, experts_touched, measured_shapes, no_gain_from
from llamamoe.conversion.plan import plan_split
from llamamoe.conversion.preference import preferred_shape, preferred_sizes

from ..dense import make_dense

WISHES = ("quality", "balanced", "speed")


def shape(experts: int, top_k: int, decode: float, prefill: float, width: int = 64, **keys: Any) -> MeasuredShape:
    values = {"program": "llama.cpp", "shared": 0.125, "active": 0.45, "static": {}, "origin": "there", "model": "1B"}
    values |= {"ffn_weights": 2048 * 8192} | keys
    ratios = {"decode 1": (decode, decode, decode), "decode 8": (1.0, 1.0, 1.0), "prefill": (prefill, prefill, prefill)}
    return MeasuredShape(num_experts=experts, top_k=top_k, expert_width=width, ratios=ratios, **values)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*rows: MeasuredShape) -> None:
        for module in (expected_speed, preference):
            monkeypatch.setattr(module, "measured_shapes", lambda: rows)

    return use


def test_wishes_follow_from_the_measurements(table: Callable[..., None]) -> None:
    table(
        shape(8, 3, 1.70, 1.30), shape(32, 12, 1.60, 1.20), shape(56, 21, 1.50, 1.10),
        shape(64, 24, 2.0, 2.0, width=112), shape(4, 1, 3.0, 3.0, active=0.25), shape(0, 0, 4.0, 4.0),
    )  # fmt: skip
    assert [preferred_shape(wish)[0] for wish in WISHES] == [56, 32, 8]  # type: ignore[arg-type]


def test_a_shape_that_is_slow_on_average_is_not_balanced(table: Callable[..., None]) -> None:
    def use(narrow: float) -> None:
        table(
            shape(8, 3, 1.7, 1.3), shape(32, 12, 1.7, 1.3), shape(56, 21, 1.7, 1.3),
            shape(8, 3, 1.4, 1.2, program="transformers"), shape(32, 12, 1.2, 1.1, program="transformers"),
            shape(56, 21, narrow, narrow, program="transformers"),
        )  # fmt: skip

    use(1.0)  # 0.88 of the fastest by the geometric mean; 32 experts 0.94
    assert preferred_shape("balanced")[0] == 32
    use(1.1)  # 0.92
    assert preferred_shape("balanced")[0] == 56


def test_quality_shares_a_quarter_where_it_was_measured(table: Callable[..., None]) -> None:
    table(shape(56, 21, 1.5, 1.1), shape(48, 15, 1.6, 1.3, shared=0.25), shape(32, 10, 1.6, 1.3, shared=0.25),
          shape(40, 7, 1.7, 1.5, shared=0.375))  # fmt: skip
    assert preferred_shape("quality") == (48, 15, 0.25)


def test_a_shape_that_some_program_did_not_run_is_not_chosen(table: Callable[..., None]) -> None:
    slow = {"program": "transformers"}
    table(shape(8, 3, 1.7, 1.3), shape(32, 12, 1.7, 1.3), shape(56, 21, 1.8, 1.4), shape(8, 3, 1.0, 1.0, **slow),
          shape(32, 12, 1.0, 1.0, **slow))  # fmt: skip
    assert [preferred_shape(wish)[0] for wish in WISHES] == [56, 32, 8]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1536, 4864, 5632, 8192, 8960, 11008, 14336, 18944])
@pytest.mark.parametrize("wish", WISHES)
def test_experts_are_a_multiple_of_32_wide_and_nothing_is_padded(
    wish: Any, size: int, table: Callable[..., None]
) -> None:
    table(shape(8, 3, 1.70, 1.30), shape(32, 12, 1.60, 1.25), shape(56, 21, 1.55, 1.10))
    sizes = preferred_sizes(wish, size)
    experts, top_k, shared = preferred_shape(wish)
    width, rest = divmod(size - sizes["shared"], sizes["num_experts"])
    assert (rest, width % 32, sizes["pad_to"]) == (0, 0, 32)
    assert abs(sizes["shared"] / size - shared) <= 1 / 16
    active = (sizes["shared"] + sizes["top_k"] * width) / size
    assert abs(active - (shared + (1 - shared) * top_k / experts)) <= width / size / 2 + 1e-9, "k is the nearest"


def test_small_and_odd_ffns_get_sizes_too() -> None:
    rng = random.Random(0)
    for size in [8, 16, 31, 172, *(rng.randrange(8, 40000) for _ in range(200))]:
        for wish in WISHES:
            sizes = preferred_sizes(wish, size)  # type: ignore[arg-type]
            assert 1 <= sizes["top_k"] < sizes["num_experts"]
            kept = sizes["shared"] if isinstance(sizes["shared"], int) else round(size * sizes["shared"])
            assert sizes["num_experts"] <= size - kept


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"), intermediate_size=1536)


@pytest.mark.parametrize(
    "given", [{"num_experts": 16}, {"top_k": 2}, {"shared": 0}, {"shared": 384}, {"pad_to": 8}, {"target": "glm4_moe"}]
)
def test_what_is_given_is_kept(given: dict[str, Any], dense: Path) -> None:
    plan = plan_conversion(dense, load_recipe(given={"prefer": "balanced", "method": "random", **given}))
    for key, value in given.items():
        assert getattr(plan.recipe, key) == value
    assert plan.layout.top_k < plan.layout.num_experts


def test_the_recipe_in_a_plan_plans_the_same(dense: Path) -> None:
    model = understand(SafetensorsCheckpoint(dense))
    first = plan_split(model, load_recipe(given={"prefer": "speed", "method": "random"}))
    again = plan_split(model, load_recipe(given=json.loads(first.recipe.model_dump_json())))
    assert (again.layout, again.warnings) == (first.layout, first.warnings)
    assert first.recipe.prefer is None, "what is written has sizes"
    assert first.layout.num_experts != 8 or first.layout.top_k != 2, "not the plain default"


def test_a_wish_that_changes_nothing_is_told(dense: Path) -> None:
    given = {"prefer": "speed", "method": "random", "num_experts": 8, "top_k": 2, "shared": 0}
    plan = plan_conversion(dense, load_recipe(given=given))
    assert any("--prefer speed has no effect" in warning for warning in plan.warnings)
    plan = plan_conversion(dense, load_recipe(given=given | {"prefer": None}))
    assert not any("prefer" in warning for warning in plan.warnings)


def test_pruning_and_unknown_wishes_are_refused(dense: Path) -> None:
    with pytest.raises(RefusedError, match="static makes none"):
        plan_conversion(dense, load_recipe(given={"prefer": "speed", "method": "static", "shared": 0.5}))
    with pytest.raises(UsageError, match="prefer"):
        load_recipe(given={"prefer": "cheap"})


# ---- what to expect ------------------------------------------------------------------------------------------------


def test_the_number_of_experts_touched_is_that_of_random_choices() -> None:
    rng = random.Random(0)
    for experts, top_k, tokens in [(8, 3, 1), (32, 12, 4), (64, 8, 8)]:
        counts = [len({each for _ in range(tokens) for each in rng.sample(range(experts), top_k)}) for _ in range(2000)]
        assert experts_touched(experts, top_k, tokens) == pytest.approx(sum(counts) / len(counts), rel=0.02)


def test_a_plan_says_what_speed_to_expect(dense: Path, table: Callable[..., None]) -> None:
    like = shape(32, 12, 1.6, 1.25, static={"decode 1": (1.5, 1.4, 1.6)})
    table(shape(8, 3, 1.7, 1.3), like, shape(0, 0, 9.0, 9.0, active=0.45))
    given = {"method": "random", "num_experts": 42, "top_k": 16, "shared": 0.125}
    plan = plan_conversion(dense, load_recipe(given=given))
    (found,) = plan.to_json()["speed"]["measured"]
    assert (found["shape"], found["origin"]) == ("12 of 32, 12.5 % shared", "there")
    assert found["over_dense"]["decode 1"] == [1.6, 1.6, 1.6]
    assert found["static_over_dense"]["decode 1"] == [1.5, 1.4, 1.6]
    assert plan.to_json()["speed"]["batches"][0] == {
        "tokens": 1, "experts_touched": pytest.approx(16), "weights_read": pytest.approx((192 + 16 * 32) / 1536),
    }  # fmt: skip
    batch = no_gain_from(plan.layout, plan.model.spec)
    assert 4 <= batch <= 8, "16 of 42 at each token"


@pytest.mark.parametrize(("times", "told"), [(1, None), (3.9, None), (4, 4), (19, 19)])
def test_a_plan_says_if_the_measured_model_was_much_larger(
    times: float, told: float | None, dense: Path, table: Callable[..., None]
) -> None:
    spec = understand(SafetensorsCheckpoint(dense)).spec
    table(shape(32, 12, 1.6, 1.25, ffn_weights=times * spec.hidden_size * spec.intermediate_size))
    given = {"method": "random", "num_experts": 32, "top_k": 12, "shared": 0.125}
    (found,) = plan_conversion(dense, load_recipe(given=given)).to_json()["speed"]["measured"]
    assert found["times_smaller"] == told


def test_a_plan_says_what_became_of_a_wish(tmp_path: Path, table: Callable[..., None]) -> None:
    table(shape(32, 10, 1.6, 1.25, shared=0.25))

    def told(size: int, **given: Any) -> list[str]:
        model = make_dense(tmp_path / str(size), intermediate_size=size)
        plan = plan_conversion(model, load_recipe(given={"prefer": "balanced", "method": "random", **given}))
        return [note for note in plan.advice if "--prefer" in note]

    (note,) = told(1536)
    assert "is 10 of 32 experts, 25 % shared; the FFN of 1,536 neurons gets 11 of 36" in note
    assert told(4096) == []
    assert told(1536, num_experts=8) == []


def test_a_shape_unlike_all_measured_ones_gets_no_number(dense: Path, table: Callable[..., None]) -> None:
    table(shape(32, 12, 1.6, 1.25))
    for given in (
        {"num_experts": 8, "top_k": 3},
        {"num_experts": 32, "top_k": 4},
        {"num_experts": 32, "shared": 0.5, "top_k": 1},
    ):
        plan = plan_conversion(dense, load_recipe(given={"method": "random", "shared": 0.125} | given))
        assert plan.to_json()["speed"]["measured"] == []


def test_pruning_is_like_pruning_only(dense: Path, table: Callable[..., None]) -> None:
    table(shape(32, 12, 1.6, 1.25, active=0.5), shape(0, 0, 1.5, 1.6, active=0.5, shared=0.5))
    plan = plan_conversion(dense, load_recipe(given={"method": "static", "shared": 0.5, "shared_by": "weight_norm"}))
    speed = plan.to_json()["speed"]
    assert [each["shape"] for each in speed["measured"]] == ["static, 50%"]
    assert speed["batches"] == []


def test_the_table_says_where_its_numbers_are_from() -> None:
    rows = measured_shapes()
    assert {row.program for row in rows} >= {"llama.cpp"}
    for row in rows:
        assert set(row.ratios) == {"decode 1", "decode 8", "prefill"}
        assert all(lowest <= ratio <= highest for ratio, lowest, highest in row.ratios.values())
        assert "1B shape" in row.origin
        assert "threads" in row.origin
        assert bool(row.static) == bool(row.num_experts), "pruning in the same run"


def test_no_speed_is_told_in_a_program_that_does_not_run_the_target(dense: Path) -> None:
    given = {"num_experts": 32, "top_k": 10, "shared": 0.25, "method": "random"}
    for target, programs in (("qwen2_moe", {"llama.cpp", "transformers"}), ("ernie4_5_moe", {"transformers"})):
        shared = {"shared": "10x"} if target == "ernie4_5_moe" else {}
        plan = plan_conversion(dense, load_recipe(given=given | shared | {"target": target}))
        assert {each["program"] for each in plan.to_json()["speed"]["measured"]} == programs


@pytest.mark.parametrize("active", [0.45, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("sizes", [{}, {"num_experts": 16}, {"num_experts": 24, "shared": 0.125}, {"shared": 384}])
@pytest.mark.parametrize("wish", [None, "balanced", "quality"])
def test_the_active_share_decides_k(wish: str | None, sizes: dict[str, Any], active: float, dense: Path) -> None:
    given = {"prefer": wish, "method": "cluster_shared", "active": active, **sizes}
    plan = plan_conversion(dense, load_recipe(given=given))
    step = plan.layout.expert_width / 1536
    found = plan.layout.active_real(1536) / 1536
    assert abs(found - active) <= 0.51 * step + 0.02
    assert plan.recipe.active is None, "what is written has k"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"active": 0.5, "top_k": 2}, "give one of the two"),
        ({"active": 1.5}, "active"),
        ({"active": 0}, "active"),
        ({"active": 0.2, "shared": 0.25, "method": "cluster_shared"}, "25 % of the neurons are shared"),
        ({"active": 0.5, "method": "static", "shared": 0.5}, "--active chooses the number of selected experts"),
    ],
)
def test_a_share_that_means_nothing_is_refused(given: dict[str, Any], told: str, dense: Path) -> None:
    with pytest.raises((UsageError, RefusedError), match=told):
        plan_conversion(dense, load_recipe(given=given))


def test_k_alone_above_the_plain_default_number_of_experts(dense: Path) -> None:
    text = {"calibration": ["auto"]}
    layout = plan_conversion(dense, load_recipe(given={"top_k": 20, **text})).layout
    assert layout.top_k == 20
    assert layout.num_experts > 20
    with pytest.raises(UsageError, match="must not exceed num_experts = 8, its default"):
        load_recipe(given={"top_k": 20})
