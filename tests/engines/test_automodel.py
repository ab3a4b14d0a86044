"""NeMo AutoModel computes what ``split --require automodel`` writes, trains on our tokens, and writes it back bit for bit.

Needs an interpreter with nemo-automodel, named by ``LLAMAMOE_AUTOMODEL_PYTHON`` (``make test-automodel`` makes it). What
is refused and why is tested without it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llamamoe import evaluate, export_tokens, load_recipe, plan_conversion, split, tokenize
from llamamoe.errors import RefusedError
from tests.dense import make_dense
from tests.tokens import make_text
from tests.tokens import recipe as token_recipe

PYTHON = os.environ.get("LLAMAMOE_AUTOMODEL_PYTHON")
needs_engine = pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_AUTOMODEL_PYTHON names no interpreter")
SIZES = {"num_experts": 4, "top_k": 2, "method": "kmeans", "router": "centroid", "require": "automodel"}
WIDE: dict[str, Any] = {"head_dim": 64, "max_position_embeddings": 8192}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
LINEAR = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3", {"shared": 0}),
    "qwen3_moe, soft, a dense layer": ("qwen3", {"shared": 0, "router_scale": "soft", "keep_dense": [-1]}),
    "glm4_moe": ("llama", {"shared": "2x"}),
    "glm4_moe, nothing shared": ("llama", {"shared": 0}),
    "glm4_moe, tied, a dense layer": ("llama-tied", {"shared": "1x", "keep_dense": [0]}),
    "glm4_moe, biases": ("qwen2", {"shared": "2x", "rescale": "unit"}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama3": ("llama", {"shared": "1x"}, {"rope_parameters": LLAMA3, **WIDE}, "positions of rope_type 'llama3'"),
    "yarn": ("llama", {"shared": "1x"}, {"rope_parameters": YARN, **WIDE}, "positions of rope_type 'yarn'"),
    "linear": ("llama", {"shared": "1x"}, {"rope_parameters": LINEAR, **WIDE}, "positions of rope_type 'linear'"),
    "one expert": ("qwen3", {"shared": 0, "top_k": 1}, {}, "never that of one"),
    "window": ("qwen3", {"shared": 0}, WINDOW, "ignores the attention window"),
}


def run(model: Path, *arguments: object) -> dict[str, Any]:
    """Return what the script prints that runs where NeMo AutoModel is installed."""
    command = [PYTHON or "", Path(__file__).with_name("run_automodel.py"), model, *(arguments or ("-", "-", "-"))]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@needs_engine
@pytest.mark.parametrize("name", EXACT)
def test_automodel_computes_the_same_and_writes_it_back(name: str, tmp_path: Path) -> None:
    variant, given = EXACT[name]
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2)
    result = split(dense, tmp_path / "moe", load_recipe(given=SIZES | given))
    assert json.loads((result.out / "config.json").read_text())["model_type"] == name.split(",")[0]
    found = run(result.out)
    assert found["difference"] < 1e-5 * found["largest"]
    assert found["changed"] == []


@needs_engine
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_a_run_as_the_recipe_configures_it_comes_back(name: str, tmp_path: Path) -> None:
    variant, given = EXACT[name]
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2)
    model = tmp_path / "moe"
    split(dense, model, load_recipe(given=SIZES | given | {"router_scale": "soft"}))
    make_text(tmp_path / "text")
    tokenize(token_recipe(model, tmp_path / "text", validation={"documents": 8}), tmp_path / "tokens")
    exported = export_tokens(tmp_path / "tokens", tmp_path / "data")
    (tmp_path / "blend.json").write_text(json.dumps(exported.to_json()["data_path"]))
    found = run(model, tmp_path / "blend.json", tmp_path / "index", tmp_path / "back")
    assert found["losses"][0] == pytest.approx(found["transformers"], abs=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    assert found["after"] < 1e-5, "transformers computes what the trained model does"
    text = sorted((tmp_path / "text").rglob("*.jsonl"))
    assert evaluate(tmp_path / "back", text, max_tokens=200).model.mean_over_domains.loss > 0


@needs_engine
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_computed_otherwise(name: str, tmp_path: Path) -> None:
    variant, given, config, _ = REFUSED[name]
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2, **config)
    target = {"target": "qwen3_moe" if variant == "qwen3" else "glm4_moe", "require": None}
    split(dense, tmp_path / "moe", load_recipe(given=SIZES | given | target))
    found = run(tmp_path / "moe")
    assert found["difference"] > 1e-3 * found["largest"]


@pytest.mark.parametrize("name", EXACT)
def test_the_target_is_chosen(name: str, tmp_path: Path) -> None:
    variant, given = EXACT[name]
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2)
    assert plan_conversion(dense, load_recipe(given=SIZES | given)).target.name == name.split(",")[0]


@pytest.mark.parametrize("name", [*REFUSED, "mixtral"])
def test_what_it_would_compute_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    other = ("llama", {"shared": 0, "target": "mixtral"}, {}, "no model of its own that computes mixtral")
    variant, given, config, message = REFUSED.get(name, other)
    dense = make_dense(tmp_path / "dense", variant, num_hidden_layers=2, **config)
    with pytest.raises(RefusedError, match=message):
        plan_conversion(dense, load_recipe(given=SIZES | given))
