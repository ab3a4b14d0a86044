"""The plan: sizes that fit, sizes that are refused with a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import llamamoe
from llamamoe.errors import RefusedError
from tests.models import make_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("plan") / "dense")


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
        ({"shared": 8, "target": "mixtral"}, ["mixtral has no shared expert", "8 neurons"]),
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
