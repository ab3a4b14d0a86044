"""Every recipe of instruction and preference tuning runs two steps under TRL's own command, on a converted model with a chat template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe import fix_config, format_chats, load_recipe, split
from tests.dense import make_dense

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [path for kind in ("sft", "dpo") for path in sorted((ROOT / "recipes" / kind).glob("*.yaml"))]
CASES = [("mixtral", path) for path in RECIPES]
CASES += [("granitemoeshared", path) for path in RECIPES if path.parent.name == "sft"]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    dense = make_dense(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(dense)
    given = {"num_experts": 4, "top_k": 2, "method": "random", "target": request.param}
    split(dense, folder / "moe", load_recipe(given=given), verify=False)
    said = {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]}
    pair = {key: f"\n\nHuman: ab\n\nAssistant: {text}" for key, text in (("chosen", "cd"), ("rejected", "ef"))}
    for name, row in (("conversations", said), ("preferences", pair)):
        (folder / f"{name}.json").write_text(json.dumps([row] * 8))
        assert format_chats([folder / f"{name}.json"], folder / f"{name}.jsonl").rows == 8
    return folder / "moe"


def merged_as_the_recipe_says(model: Path, folder: Path) -> None:
    """The merged model is native, is another than before, and computes what the adapters did."""
    from peft import PeftModel

    ids_BT = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(model)(ids_BT).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "out")
        expected = adapted(ids_BT).logits
        adapted.merge_and_unload().save_pretrained(folder / "merged")
        fix_config(folder / "merged")
        merged, info = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
        assert not info["unexpected_keys"]
        found = merged(ids_BT).logits
    assert not torch.equal(before, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "path"), CASES, indirect=["model"], ids=lambda p: p if isinstance(p, str) else f"{p.parent.name}-{p.stem}"
)
def test_a_recipe_runs_two_steps(model: Path, path: Path, tmp_path: Path) -> None:
    shrunk = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_length": 32,
              "use_cpu": True, "bf16": False, "logging_steps": 1}  # fmt: skip
    flags = [part for key, value in shrunk.items() for part in (f"--{key}", str(value))]
    command = [
        sys.executable, "-m", f"trl.scripts.{path.parent.name}", "--config", str(path),
        "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out"), *flags,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, env=environment, cwd=model.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "aux_loss" not in done.stdout, "the balancing of transformers is off"
    assert ("rewards/margins" in done.stdout) == (path.parent.name == "dpo")
    if path.stem == "lora":
        names = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert sorted(names["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
        weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert any(".experts." in name for name in weights), "experts have adapters, whatever their module is called"
        merged_as_the_recipe_says(model, tmp_path)
    else:
        if path.parent.name == "sft":  # DPO does not write the key
            assert json.loads((tmp_path / "out" / "config.json").read_text())["router_aux_loss_coef"] == 0
        fix_config(tmp_path / "out")
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
