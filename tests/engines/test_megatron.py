"""Megatron-Core computes what ``split --require megatron`` writes, and Megatron-Bridge writes it back bit for bit.

Needs an interpreter with megatron-core and megatron-bridge, named by ``LLAMAMOE_MEGATRON_PYTHON`` (``make
test-megatron`` makes it). What is refused and why is tested without it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llamamoe import load_recipe, plan_conversion, split
from llamamoe.errors import RefusedError
from tests.dense import make_dense

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


def run_megatron(folder: Path) -> dict[str, Any]:
    """Return what `run_megatron.py` prints of a folder."""
    script = Path(__file__).with_name("run_megatron.py")
    done = subprocess.run([PYTHON or "", script, folder], capture_output=True, text=True, check=False)
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
    found = run_megatron(result.out)
    assert found["difference"] < 1e-5 * found["largest"]
    assert found["loss_difference"] < 1e-5
    assert found["changed"] == []


@pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_MEGATRON_PYTHON names no interpreter")
def test_the_rope_that_is_refused_is_computed_wrongly(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama", num_hidden_layers=2, rope_parameters=LLAMA3)
    split(dense, tmp_path / "moe", load_recipe(given=SIZES | {"target": "glm4_moe", "shared": "1x"}))
    found = run_megatron(tmp_path / "moe")
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
