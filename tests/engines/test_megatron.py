"""Megatron-Core computes what ``split --require megatron`` writes, and Megatron-Bridge writes it back bit for bit.

Needs an interpreter with megatron-core and megatron-bridge, named by ``LLAMAMOE_MEGATRON_PYTHON`` (``make
test-megatron`` makes it). What is refused and why is tested without it.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from llamamoe_recipes.launch.megatron_bridge import check_router, keep_files

from llamamoe import export_tokens, load_recipe, plan_conversion, report, retop, split, tokenize, verify
from llamamoe.errors import RefusedError
from tests.dense import make_dense
from tests.tokens import make_text
from tests.tokens import recipe as token_recipe

PYTHON = os.environ.get("LLAMAMOE_MEGATRON_PYTHON")
SIZES = {"num_experts": 4, "top_k": 2, "method": "kmeans", "router": "centroid"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3", {"shared": 0}),
    "qwen3_moe, soft": ("qwen3", {"shared": 0, "router_scale": "soft"}),
    "glm4_moe": ("llama", {"shared": "1x"}),
    "glm4_moe, nothing shared": ("llama", {"shared": 0}),
    "glm4_moe, a dense layer": ("llama", {"shared": "1x", "keep_dense": [0]}),
    "glm4_moe, biases": ("qwen2", {"shared": "1x"}),
}


def run(script: str, *arguments: Path) -> dict[str, Any]:
    """Return what a script prints that runs where Megatron is installed."""
    command = [PYTHON or "", Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def plan(folder: Path, variant: str, *, config: dict[str, Any] | None = None, **given: Any) -> Any:
    """Plan a conversion that Megatron must compute."""
    dense = make_dense(folder / "dense", variant, num_hidden_layers=2, **(config or {}))
    return plan_conversion(dense, load_recipe(given=SIZES | {"require": "megatron"} | given))


@pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_MEGATRON_PYTHON names no interpreter")
@pytest.mark.parametrize("name", EXACT)
def test_megatron_computes_the_same_and_writes_it_back(name: str, tmp_path: Path) -> None:
    variant, given = EXACT[name]
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2)
    result = split(dense, tmp_path / "moe", load_recipe(given=SIZES | {"require": "megatron"} | given))
    assert json.loads((result.out / "config.json").read_text())["model_type"] == name.split(",")[0]
    found = run("run_megatron.py", result.out, tmp_path / "back")
    assert found["difference"] < 1e-5 * found["largest"]
    assert found["loss_difference"] < 1e-5
    assert found["changed"] == []
    keep_files(result.out, tmp_path / "back")
    assert verify(tmp_path / "back", against=dense).passed


@pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_MEGATRON_PYTHON names no interpreter")
@pytest.mark.parametrize("name", ["qwen3_moe, soft", "glm4_moe"])
def test_a_run_as_the_recipe_configures_it_comes_back(name: str, tmp_path: Path) -> None:
    variant, given = EXACT[name]
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2)
    model = tmp_path / "moe"
    split(dense, model, load_recipe(given=SIZES | {"require": "megatron", "router_scale": "soft"} | given))
    make_text(tmp_path / "text")
    tokenize(token_recipe(model, tmp_path / "text", validation={"documents": 8}), tmp_path / "tokens")
    export_tokens(tmp_path / "tokens", tmp_path / "data")
    found = run("train_megatron.py", model, tmp_path / "data", tmp_path / "run", tmp_path / "back")
    assert found["losses"][0] == pytest.approx(found["transformers"], abs=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    retop(tmp_path / "back", tmp_path / "three", top_k=3)
    text = sorted((tmp_path / "text").rglob("*.jsonl"))
    numbers = report([tmp_path / "back"], text, against=dense, json_out=tmp_path / "report.json", max_tokens=200)
    assert (
        numbers["parent"]["scores"]["mean_over_domains"]["loss"]
        != numbers["models"][0]["scores"]["mean_over_domains"]["loss"]
    )


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_a_hard_router_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"llamamoe": {"router_scale": name}}))
    expected = pytest.raises(SystemExit, match="--router-scale soft") if name == "hard" else nullcontext()
    with expected:
        check_router(tmp_path)


@pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_MEGATRON_PYTHON names no interpreter")
def test_the_rope_that_is_refused_is_computed_wrongly(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama", num_hidden_layers=2, rope_parameters=LLAMA3)
    split(dense, tmp_path / "moe", load_recipe(given=SIZES | {"target": "glm4_moe", "shared": "1x"}))
    found = run("run_megatron.py", tmp_path / "moe", tmp_path / "back")
    assert found["difference"] > 1e-3 * found["largest"]


@pytest.mark.parametrize("name", EXACT)
def test_the_target_is_chosen(name: str, tmp_path: Path) -> None:
    variant, given = EXACT[name]
    assert plan(tmp_path, variant, **given).target.name == name.split(",")[0]


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("llama", {"target": "mixtral", "shared": 0}, "does not compute mixtral exactly"),
        ("llama", {"target": "ernie4_5_moe", "shared": 0}, "does not compute ernie4_5_moe exactly"),
        ("llama", {"shared": "2x"}, r"\(--shared 1x\), not 2 times as wide"),
        ("llama", {"shared": "1x", "config": {"rope_parameters": LLAMA3}}, "ignores rope_type 'llama3'"),
        ("llama", {"shared": "1x", "top_k": 1}, "never that of one"),
        ("qwen3", {"shared": 0, "keep_dense": [0], "target": "qwen3_moe"}, "leave out --keep-dense"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused(
    variant: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=message):
        plan(tmp_path, variant, **given)
