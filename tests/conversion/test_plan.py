"""The plan: sizes that fit, sizes that are refused with a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import llamamoe
from llamamoe.errors import RefusedError
from tests.dense import make_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("plan") / "dense")


@pytest.fixture(autouse=True)
def _text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "text.txt").open("wb") as file:  # a plan finds the calibration text and does not open it
        file.truncate(2**32)


def plan(source: Path, **given: Any) -> Any:
    return llamamoe.plan_conversion(
        source, llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, **given})
    )


@pytest.mark.parametrize("target", ["glm4_moe", "ernie4_5_moe"])
@pytest.mark.parametrize(("experts", "shared"), [(4, 50), (4, 1), (8, 100), (2, 90), (16, 33), (3, 101)])
def test_widths_named_in_the_refusal_work(dense: Path, target: str, experts: int, shared: int) -> None:
    with pytest.raises(RefusedError) as caught:
        plan(dense, num_experts=experts, target=target, shared=shared)
    assert caught.value.exit_code == 3
    assert f"which {shared} is not" in str(caught.value)
    ways = re.findall(r"--shared (\d+x) \((\d+) neurons\)", str(caught.value))
    assert ways
    for multiple, neurons in ways:
        for value in (multiple, int(neurons)):
            layout = plan(dense, num_experts=experts, target=target, shared=value).layout
            assert layout.num_shared == int(neurons)
            assert layout.shared_width % layout.expert_width == 0


@pytest.mark.parametrize("target", ["glm4_moe", "ernie4_5_moe"])
@pytest.mark.parametrize("experts", [2, 3, 4, 7, 8, 16, 21])
def test_every_multiple_fits_or_leaves_nothing_to_route(dense: Path, target: str, experts: int) -> None:
    for multiple in range(1, 12):
        try:
            found = plan(dense, num_experts=experts, target=target, shared=f"{multiple}x")
        except RefusedError as error:
            reason = str(error)
        else:
            reason = ""
        if reason:
            assert re.search("nothing is left to route|is more than the", reason)
            continue
        assert found.layout.shared_width % found.layout.expert_width == 0
        assert found.layout.num_experts * found.layout.expert_width >= 172 - found.layout.num_shared
        again = llamamoe.plan_conversion(dense, found.recipe)
        assert again.layout == found.layout, "the resolved recipe means the same"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_experts": 173}, ["num_experts = 173", "172 neurons"]),
        ({"shared": 172}, ["shared = 172", "nothing is left to route"]),
        ({"shared": 171}, ["num_experts = 4 is more than the 1 neurons"]),
        ({"keep_dense": [2]}, ["--keep-dense names layer 2", "layers 0 to 1"]),
        ({"keep_dense": [-3]}, ["--keep-dense names layer -3"]),
        ({"keep_dense": [0, 1]}, ["names every layer"]),
        ({"keep_dense": [0], "target": "mixtral"}, ["mixtral has no dense layers"]),
        ({"keep_dense": [1], "target": "glm4_moe"}, ["glm4_moe can keep only the first layers dense, not [1]"]),
        (
            {"shared": 8, "target": "mixtral"},
            ["the target mixtral cannot hold this", "mixtral has no shared expert", "8 neurons"],
        ),
        ({"target": "qwen3_moe"}, ["qwen3_moe cannot hold attention without an RMSNorm", "methods --matrix"]),
        ({"strict": True, "dtype": "bfloat16"}, ["--strict refuses", "rounded to BF16"]),
    ],
)
def test_refusals(dense: Path, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RefusedError) as caught:
        plan(dense, **keys)
    assert caught.value.exit_code == 3
    for word in words:
        assert word in str(caught.value)


def test_seed_and_shard_size(dense: Path, tmp_path: Path) -> None:
    def run(name: str, **given: Any) -> Any:
        recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, **given})
        return llamamoe.split(dense, tmp_path / name, recipe, verify=False)

    one, same = run("one"), run("same")
    for file in sorted(p.name for p in one.out.iterdir() if p.name != "llamamoe_receipt.json"):
        assert (one.out / file).read_bytes() == (same.out / file).read_bytes(), file
    assert {k: v for k, v in one.receipt.items() if k != "run"} == {k: v for k, v in same.receipt.items() if k != "run"}
    assert run("sharded", shard_size="100KB").receipt["weights_sha256"] == one.receipt["weights_sha256"]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert run("other", seed=1).receipt["weights_sha256"] != one.receipt["weights_sha256"]


# ---- methods that need text -----------------------------------------------------------------------------------------

TEXT = {"calibration": "text.txt"}


def auto_plan(source: Path, **given: Any) -> Any:
    return llamamoe.plan_conversion(source, llamamoe.load_recipe(given=given))


def test_without_text_auto_falls_back_to_weights_and_warns(dense: Path) -> None:
    found = auto_plan(dense)
    assert found.recipe.method.name == "cluster_shared"
    assert (found.recipe.num_experts, found.recipe.top_k, found.recipe.repair.name) == (8, 2, "none")
    assert found.layout.num_shared == 43
    assert found.calibration is None
    assert any("no calibration text" in w and "--calibration" in w for w in found.warnings)
    with pytest.raises(RefusedError, match="no calibration text"):
        auto_plan(dense, strict=True)
    assert not auto_plan(dense, method="cluster_shared").warnings, "what was asked for needs no warning"


def small_default(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    wanted = {"method": "cluster_shared", "shared_by": "power", "router": "ridge", "repair": "least_squares"} | changes
    sizes = {"num_experts": 12, "top_k": 4, "shared": 0.3}
    monkeypatch.setattr("llamamoe.conversion.defaults.CALIBRATED_DEFAULT", wanted)
    monkeypatch.setattr("llamamoe.conversion.open_sizes.preferred_sizes", lambda prefer, size: sizes)
    return wanted


def test_with_text_auto_is_the_calibrated_default(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_default(monkeypatch)
    found = auto_plan(dense, **TEXT)
    recipe = found.recipe
    names = (recipe.method.name, recipe.shared_by.name, recipe.router.name, recipe.repair.name)
    assert names == ("cluster_shared", "power", "ridge", "least_squares")
    assert (recipe.num_experts, recipe.top_k, recipe.shared) == (12, 4, round(0.3 * 172))
    assert found.calibration is not None
    assert not found.warnings
    again = llamamoe.plan_conversion(dense, recipe)
    assert (again.recipe, again.layout, again.calibration) == (recipe, found.layout, found.calibration)


def test_the_default_suits_the_width_of_the_ffn(tmp_path: Path) -> None:
    for size, sizes in ((172, (4, 1)), (1536, (32, 7)), (640, (20, 4))):
        folder = make_dense(tmp_path / str(size), "llama", intermediate_size=size)
        found = auto_plan(folder, **TEXT)
        assert (found.layout.num_experts, found.layout.top_k) == sizes
        assert found.recipe.method.name == "token_clusters"
        assert found.recipe.repair.name == "distill"


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"num_experts": 6}, (6, 2)),
        ({"top_k": 2}, (6, 2)),
        ({"num_experts": 5, "top_k": 3}, (5, 3)),
        ({"num_experts": 2}, (2, 1)),
    ],
)
def test_a_size_alone_keeps_the_share_of_the_default(
    dense: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, int], sizes: tuple[int, int]
) -> None:
    small_default(monkeypatch)
    recipe = auto_plan(dense, **TEXT, **given).recipe
    assert (recipe.num_experts, recipe.top_k) == sizes


def test_what_is_named_is_kept_by_auto(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_default(monkeypatch)
    recipe = auto_plan(
        dense, **TEXT, shared=0.5, shared_by="weight_norm", router={"name": "ridge", "ridge": 0.5}, repair="none"
    ).recipe
    assert (recipe.shared, recipe.shared_by.name, recipe.repair.name) == (86, "weight_norm", "none")
    assert recipe.router.options["ridge"] == 0.5


@pytest.mark.parametrize(("target", "shared"), [("mixtral", 0), ("glm4_moe", "multiple"), ("qwen2_moe", 52)])
def test_auto_shares_what_the_named_target_can_hold(
    dense: Path, monkeypatch: pytest.MonkeyPatch, target: str, shared: Any
) -> None:
    small_default(monkeypatch)
    layout = auto_plan(dense, **TEXT, target=target).layout
    if shared == "multiple":
        assert layout.num_shared % layout.expert_width == 0
        assert layout.num_shared == 5 * 16  # 5 of 12 + 5 parts of the FFN, ceil(172 / 17) = 11 neurons padded to 16
    else:
        assert layout.num_shared == shared


def test_auto_does_without_plugins_that_are_not_there(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_default(monkeypatch, router="nowhere", repair="nothing_like_it")
    recipe = auto_plan(dense, **TEXT).recipe
    assert (recipe.router.name, recipe.repair.name) == ("centroid", "none")
    small_default(monkeypatch, method="nowhere")
    assert auto_plan(dense, **TEXT).recipe.method.name == "cluster_shared"


@pytest.mark.parametrize(
    ("given", "who"),
    [
        ({"router": "ridge"}, "--router ridge"),
        ({"repair": "least_squares"}, "--repair least_squares"),
        ({"shared": 0.25, "shared_by": "power"}, "--shared-by power"),
        ({"method": "activation"}, "--method activation"),
    ],
)
def test_methods_that_need_text_are_refused_without_it(dense: Path, given: dict[str, Any], who: str) -> None:
    with pytest.raises(RefusedError) as caught:
        plan(dense, **{"method": "random", **given})
    assert caught.value.exit_code == 3
    assert f"calibration text is needed by {who}" in str(caught.value)
    assert "--calibration PATH" in str(caught.value)
    assert "--calibration auto" in str(caught.value)


def test_a_selector_that_is_not_asked_needs_no_text(dense: Path) -> None:
    assert plan(dense, method="random", shared=0, shared_by="power").calibration is None


@pytest.mark.parametrize("calibration", ["text.txt", "auto"])
def test_text_that_nobody_needs_is_not_read(dense: Path, calibration: str) -> None:
    found = plan(dense, method="random", calibration=calibration)
    assert found.calibration is None
    assert found.parity == "exact"
    assert any("it is not read" in w for w in found.warnings)


def test_controls_are_refused(dense: Path) -> None:
    with pytest.raises(RefusedError, match="only `llamamoe compare` can simulate it"):
        plan(dense, method="random", router="oracle", **TEXT)


def test_repair_ends_parity_and_says_so(dense: Path) -> None:
    found = plan(dense, method="cluster_shared", repair="least_squares", target="qwen2_moe", **TEXT)
    assert (found.parity, found.kept) == ("none", "gate_up")
    assert found.exactness.startswith("not exact, on purpose: the repair fits the weights to the selected experts")
    assert found.exactness.endswith("the model with all experts selected computes what its parent computes")
    untrained = "quality collapses until the model is trained"
    assert not any(untrained in advice for advice in found.advice)
    found = plan(dense, method="cluster_shared", repair="none", target="qwen2_moe")
    assert found.parity == "exact"
    assert any(untrained in advice for advice in found.advice)


def test_costs_of_calibration_by_hand(dense: Path) -> None:
    keys = {"method": "random", "router": "ridge", "calibration_tokens": 1000, "calibration_length": 30, **TEXT}
    found = plan(dense, **keys).calibration
    tokens = 33 * 30
    assert (found.tokens, found.length, found.needing) == (tokens, 30, ("--router ridge",))
    assert found.state_bytes == 2 * 4 * tokens * 64
    assert found.input_bytes == 4 * tokens * 64
    attention = 2 * 64 * (64 + 2 * 32 + 64) + 4 * 64 * 30
    places = 4 * 48
    ffn = 4 * (4 * 172 * 64) + 6 * 172 * 64 + 2 * 6 * places * 64
    assert found.layer_flops == tokens * (attention + ffn)
    assert found.flops == 2 * found.layer_flops
    assert found.seconds(found.flops) == 1.0
    repaired = plan(dense, **keys, repair="least_squares").calibration
    assert repaired.layer_flops > found.layer_flops + tokens * places**2
    assert repaired.peak_bytes > found.peak_bytes


def test_calibration_cost_is_linear_in_layers_and_tokens(dense: Path, tmp_path: Path) -> None:
    deep = make_dense(tmp_path / "deep", num_hidden_layers=6)
    keys = {"method": "random", "router": "ridge", "calibration_length": 32, **TEXT}
    base = plan(dense, **keys, calibration_tokens=3200).calibration.flops
    assert plan(deep, **keys, calibration_tokens=3200).calibration.flops == 3 * base
    assert plan(dense, **keys, calibration_tokens=32000).calibration.flops == 10 * base


def test_large_inputs_are_mapped_and_the_disk_must_hold_them(dense: Path, tmp_path: Path) -> None:
    keys = {"method": "random", "router": "ridge", "calibration_tokens": 2**32, **TEXT}
    found = plan(dense, **keys)
    assert found.calibration.input_place == "memory-mapped"
    assert found.calibration.disk_bytes == 3 * 4 * 2**32 * 64
    with pytest.raises(RefusedError, match="the result and the hidden states take"):
        llamamoe.split(dense, tmp_path / "out", found.recipe)


def test_sequences_are_no_longer_than_the_model_has_positions(dense: Path) -> None:
    keys = {"method": "random", "router": "ridge", **TEXT}
    assert plan(dense, **keys).recipe.calibration_length == 64
    with pytest.raises(RefusedError, match=r"65 is more than the model's 64 positions \(--set calibration_length=64\)"):
        plan(dense, **keys, calibration_length=65)


# ---- widths that can be quantised ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("plan") / "wide", intermediate_size=2000)


@pytest.mark.parametrize(
    ("given", "pad_to", "width"),
    [
        ({}, 32, 512),  # 2.4 % more than 500
        ({"shared": 0.25}, 32, 384),  # with 512 shared: 2.4 %
        ({"num_experts": 8, "top_k": 4}, 32, 256),
        ({"num_experts": 16}, 32, 128),
        ({"num_experts": 12}, 8, 168),  # 192 would cost 15 %
        ({"pad_to": 8}, 8, 504),
        ({"num_experts": 3, "target": "glm4_moe", "shared": 504}, 8, 504),  # a shared expert as wide as narrow experts
    ],
)
def test_widths_can_be_quantised_where_that_costs_little(wide: Path, given: Any, pad_to: int, width: int) -> None:
    found = plan(wide, **given)
    assert found.layout.expert_width == width
    assert found.recipe.pad_to == pad_to
    stored = found.layout.num_experts * width + found.layout.shared_width
    assert stored < 1.03 * 2000
    again = llamamoe.plan_conversion(wide, found.recipe)
    assert again.layout == found.layout, "the recipe beside the output says it all"


def test_much_padding_is_a_warning_with_a_number_of_experts_that_fits(wide: Path) -> None:
    found = plan(wide, num_experts=1000)
    assert found.padding_per_layer == 6000
    assert any(
        "6,000 zero neurons per layer" in each and "--experts 257 has width 8" in each for each in found.warnings
    )
    assert not any("zero neurons" in each for each in found.advice)
    assert plan(wide, num_experts=257).padding_per_layer == 56
    pads = plan(wide, num_experts=100, pad_to=256)
    assert any("a --pad-to smaller than 256" in each for each in pads.warnings)
    assert not plan(wide, num_experts=12).warnings
    assert not plan(wide, method="static", shared=0.5, **TEXT).warnings


def test_the_plan_names_what_cannot_be_quantised(wide: Path) -> None:
    def said(**given: Any) -> str:
        return " ".join(plan(wide, **given).advice)

    text = said(num_experts=12)
    assert "llama.cpp keeps ffn_down_exps in F16 at expert width 168, which is not a multiple of 32" in text
    count, width = map(int, re.search(r"(\d+) experts of (\d+) can be quantised", text).groups())  # type: ignore[union-attr]
    assert count < 12
    assert plan(wide, num_experts=count).layout.expert_width == width
    assert "F16" not in said(num_experts=count)
    assert "k-quants take larger types (q5_0 to q8_0) for ffn_down_exps at expert width 384" in said(shared=0.25)
    assert "nothing to mend" in said(shared=0.25)
    assert "ffn_down" not in said(num_experts=8)
    assert "ffn_down" not in said(num_experts=2, top_k=1, pad_to=8, target="jetmoe")
    assert "ffn_down_shexp in F16 at 504 shared neurons" in said(shared=504, target="granitemoeshared", pad_to=8)
    assert "ffn_down" not in said(method="static", shared=0.3, shared_by="weight_norm")


def test_wider_experts_are_advised_where_they_cost_little(tmp_path: Path) -> None:
    near = make_dense(tmp_path / "near", intermediate_size=4032)
    assert "(--pad-to 256 avoids it)" in " ".join(plan(near, num_experts=2, top_k=1).advice)
    assert "--pad-to 256" not in " ".join(plan(near, num_experts=2, top_k=1, pad_to=256).advice)


def test_the_plan_says_what_a_hard_router_and_stacked_experts_cost_elsewhere(dense: Path) -> None:
    def said(**given: Any) -> str:
        return " ".join(plan(dense, **given).advice)

    assert "programs that round probabilities to bfloat16" in said()
    assert "round probabilities to bfloat16" not in said(router_scale="soft")
    assert "round probabilities to bfloat16" not in said(top_k=4), "all experts are selected anyway"
    assert "bitsandbytes leaves the experts unquantised" in said()
    assert "bitsandbytes" not in said(method="static", shared=0.5, shared_by="weight_norm")


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral"])
def test_a_tied_head_counts_once_for_a_token_also_where_it_is_written_out(tmp_path: Path, target: str) -> None:
    found = plan(make_dense(tmp_path / "tied", "llama-tied"), target=target)
    parent, moe = found.parent_cost.active, found.cost.active
    assert ("head" in found.cost.total) == (target == "qwen2_moe")
    assert found.parent_cost.active_parameters == found.parent_cost.total_parameters
    assert moe["embedding"] + moe.get("head", 0) == parent["embedding"]


@pytest.mark.parametrize(
    ("given", "warned"), [({}, True), ({"repair": "per_expert"}, False), ({"dtype": "float32"}, False)]
)
def test_a_factor_that_rounds_once_more_is_told_with_a_way_out(
    dense: Path, given: dict[str, Any], warned: bool
) -> None:
    """Weights that are refitted are rounded once, with the factor."""
    keys = {"num_experts": 6, "target": "qwen2_moe", "rescale": "unit", "dtype": "bfloat16", "calibration": "text.txt"}
    found = [each for each in plan(dense, **keys | given).warnings if "not a power of two" in each]
    assert bool(found) == warned
    assert all("--dtype float32" in each for each in found)


@pytest.mark.parametrize(
    ("tokens", "repair", "ridge", "said"),
    [
        (1024, None, "auto", "is chosen on held-out tokens (repair.ridge: auto)"),
        (65536, None, 0.02, None),
        (1024, "distill", 0.02, "(--set repair.ridge=auto)"),
        (1024, {"name": "distill", "ridge": "auto"}, "auto", None),
        (1024, "least_squares", 0.002, "(--set repair.ridge=auto --set repair.penalty=balanced)"),
    ],
)
def test_little_text_gets_a_strength_chosen_on_held_out_tokens(
    dense: Path, tokens: int, repair: Any, ridge: Any, said: str | None
) -> None:
    """Unless a repair is named: then the plan advises it."""
    found = auto_plan(dense, **TEXT, calibration_tokens=tokens, **({} if repair is None else {"repair": repair}))
    assert found.recipe.repair.options["ridge"] == ridge
    notes = [note for note in found.advice if "are few for" in note]
    assert [said in note for note in notes] == ([] if said is None else [True])
    again = llamamoe.plan_conversion(dense, found.recipe)
    assert again.recipe == found.recipe, "the recipe beside the output does the same"


@pytest.mark.parametrize(
    ("variant", "target", "experts_shared"),
    [("olmo2", "flex_olmo", 0), ("hunyuan_v1_dense", "hunyuan_v1_moe", 1), ("llama", "qwen2_moe", 2)],
)
def test_default_sizes_suit_the_only_target_of_a_family(
    tmp_path: Path, variant: str, target: str, experts_shared: int
) -> None:
    """A share of neurons is not the default where no target of the family has a shared expert of that width."""
    source = make_dense(tmp_path / variant, variant, intermediate_size=512)
    found = llamamoe.plan_conversion(source, llamamoe.load_recipe(given=TEXT))
    assert found.target.name == target
    assert min(found.layout.num_shared // found.layout.expert_width, 2) == experts_shared


def test_the_plan_counts_the_parent_that_writes_the_text(dense: Path) -> None:
    sampled = auto_plan(dense, calibration=["auto"], calibration_tokens=256)
    assert sampled.sampling_bytes == 4 * sampled.parent_cost.total_parameters
    assert sampled.peak_bytes >= sampled.sampling_bytes
    assert (
        auto_plan(dense, calibration=["auto"], compute_dtype="bfloat16").sampling_bytes == sampled.sampling_bytes // 2
    )
    assert auto_plan(dense, **TEXT).sampling_bytes == 0
