"""Written checkpoints load in transformers 4.57 with the same logits.

Needs a second interpreter, named by ``LLAMAMOE_TRANSFORMERS4_PYTHON`` (``make test-transformers4`` makes it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.transforms.fix_config import fix_config
from tests.dense import make_dense

from .loading import PYTHON, expect_logits, run_older

pytestmark = pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_TRANSFORMERS4_PYTHON names no interpreter")

CASES = [
    ("llama", "mixtral", 0),
    ("llama-tied", "mixtral", 0),
    ("llama-llama3-rope", "mixtral", 0),
    ("llama-head-dim", "mixtral", 0),
    ("mistral-window", "mixtral", 0),
    ("phi3-longrope", "mixtral", 0),
    ("gemma", "mixtral", 0),
    ("llama-tied", "qwen2_moe", 0),
    ("llama-llama3-rope", "qwen2_moe", "2x"),
    ("qwen2", "qwen2_moe", "1x"),
    ("seed-oss", "qwen2_moe", "1x"),
    ("mistral-window", "qwen2_moe", 0),
    ("qwen3-tied", "qwen3_moe", 0),
    ("llama-llama3-rope", "glm4_moe", 0),
    ("qwen2", "glm4_moe", "1x"),
    ("seed-oss-head-dim", "glm4_moe", "1x"),
    ("qwen3", "glm4_moe", "2x"),
    ("phi3-partial", "glm4_moe", "1x"),
    ("llama-tied", "granitemoeshared", 0),
    ("llama-attention-bias", "granitemoeshared", 0.25),
    ("granite", "granitemoeshared", 0.25),
    ("llama-tied", "ernie4_5_moe", 0),
    ("llama-head-dim", "ernie4_5_moe", "2x"),
    ("ernie4_5", "ernie4_5_moe", "1x"),
    ("ernie4_5-head-dim", "mixtral", 0),
    ("llama-tied", "jetmoe", 0),
    ("llama-llama3-rope", "jetmoe", 0),
    ("llama-head-dim", "jetmoe", 0),
    ("phi3-longrope", "jetmoe", 0),
    ("llama-llama3-rope", "dense", 0.5),
    ("llama-attention-bias", "dense", 0.5),
    ("mistral-window", "dense", 0.5),
    ("qwen2-windows", "dense", 0.5),
    ("qwen3-tied", "dense", 0.5),
    ("granite", "dense", 0.5),
    ("phi3-longrope", "dense", 0.5),
    ("gemma", "dense", 0.5),
    ("seed-oss", "dense", 0.5),
    ("ernie4_5", "dense", 0.5),
    ("smollm3-windows", "dense", 0.5),
    ("olmo2-biases", "flex_olmo", 0),
    ("hunyuan_v1_dense-alpha", "hunyuan_v1_moe", 0),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "1x"),
    ("hunyuan_v1_dense-alpha", "dense", 0.5),
    ("olmo2-llama3-rope", "flex_olmo", 0),
    ("olmo2-biases", "dense", 0.5),
    ("ministral", "qwen2_moe", "1x"),
    ("ministral-windows", "dense", 0.5),
    ("internlm3", "glm4_moe", "1x"),
    ("glm", "glm4_moe", "1x"),
    ("smollm3-rope", "mixtral", 0),
    ("cohere", "dense", 0.5),
    ("cohere2-biases", "dense", 0.5),
]
"""Variant, target, shared: every target, and every trap of its spelling. `Target.majors` promises each of them."""


def _name(variant: str, target: str, shared: Any) -> str:
    return f"{variant}_{target}_{shared}".replace("-", "_").replace(".", "")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case as written, and after transformers 5 saved it, also under the names of memory, and `fix_config` mended it."""
    root = tmp_path_factory.mktemp("transformers4")
    folders = []
    for variant, target, shared in CASES:
        dense = root / "dense" / variant
        if not dense.exists():
            make_dense(dense, variant)
        name = _name(variant, target, shared)
        # all experts, because two versions may break ties of a hard router differently
        experts = 2 if target == "jetmoe" else 4
        given = {
            "method": "static" if target == "dense" else "random",
            "shared_by": "weight_norm",
            "num_experts": experts,
            "top_k": experts,
            "target": target,
            "shared": shared,
            "require": "4.57",
        }
        llamamoe.split(dense, root / name, llamamoe.load_recipe(given=given), verify=False)
        expect_logits(root / name)
        folders.append(root / name)
        for prefix, form in (("saved_", True), ("memory_", False)):
            saved = root / f"{prefix}{name}"
            AutoModelForCausalLM.from_pretrained(root / name).save_pretrained(saved, save_original_format=form)
            fix_config(saved)
            expect_logits(saved)
            folders.append(saved)
    return run_older(folders)


def test_it_is_the_older_transformers(loaded: dict[str, Any]) -> None:
    assert loaded["version"].startswith("4.57")


@pytest.mark.parametrize("saved", ["", "saved_", "memory_"])
@pytest.mark.parametrize(("variant", "target", "shared"), CASES)
def test_same_logits_and_no_complaint(
    loaded: dict[str, Any], variant: str, target: str, shared: Any, saved: str
) -> None:
    found = loaded[saved + _name(variant, target, shared)]
    assert found["keys"] == []
    assert found["warnings"] == []
    assert found["error"] <= 1e-5


def test_require_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    make_dense(tmp_path / "dense", "llama-head-dim")
    recipe = llamamoe.load_recipe(
        given={"method": "random", "num_experts": 4, "target": "qwen2_moe", "require": "4.57"}
    )
    with pytest.raises(llamamoe.RefusedError, match="transformers 5"):
        llamamoe.plan_conversion(tmp_path / "dense", recipe)
