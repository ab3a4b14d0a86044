from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe.architectures.config_compat import missing_keys
from llamamoe.architectures.sources import SOURCES
from llamamoe.architectures.targets import TARGETS
from llamamoe.checkpoint.headers import read_header
from llamamoe.checkpoint.tokenizer_difference import difference
from llamamoe.conversion.split import split
from llamamoe.errors import LlamaMoeError, RefusedError
from llamamoe.transforms.fix_config import Fixes, fix_config
from tests.dense import FFN_TARGETS, LLAMA3_ROPE, VARIANTS, make_byte_level, make_dense, variant_for

OTHER_ROPE = {"rope_type": "default", "rope_theta": 25000.0}
CASES = [  # target or None for the dense model itself, variant, recipe; every base differs from 4.57's defaults
    ("mixtral", "llama-llama3-rope", {}),
    ("mixtral", "mistral-window", {}),
    ("mixtral", "phi3-longrope", {}),
    ("qwen2_moe", "llama-llama3-rope", {"shared": 48}),
    ("qwen2_moe", "qwen2", {}),
    ("qwen3_moe", "qwen3", {"keep_dense": [0]}),
    ("glm4_moe", "phi3-partial", {"shared": "1x"}),
    ("glm4_moe", "llama-llama3-rope", {}),
    ("granitemoeshared", "granite", {}),
    ("granitemoeshared", "llama-llama3-rope", {"shared": 48}),
    ("ernie4_5_moe", "llama-llama3-rope", {"shared": "1x"}),
    (None, "llama-llama3-rope", {}),
    (None, "mistral", {}),
    (None, "qwen2-windows", {}),
    (None, "qwen3", {}),
    ("jetmoe", "llama-llama3-rope", {"num_experts": 2}),
    (None, "phi3-longrope", {}),
    (None, "phi3-partial", {}),
    (None, "granite", {}),
    (None, "gemma", {}),
    (None, "seed-oss", {}),
    (None, "ernie4_5", {}),
    (None, "smollm3", {}),
    (None, "hunyuan_v1_dense-alpha", {}),
    ("hunyuan_v1_moe", "hunyuan_v1_dense-alpha", {}),
    (None, "olmo2-biases", {}),
    ("flex_olmo", "olmo2-llama3-rope", {}),
    (None, "ministral-windows", {}),
    (None, "internlm3", {}),
    (None, "cohere", {}),
    (None, "cohere2-biases", {}),
    (None, "glm", {}),
]
IDS = [f"{variant}-{target or 'dense'}" for target, variant, _ in CASES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Save our conversions and dense models with transformers 5, before anything is fixed."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for name, (target, variant, given) in zip(IDS, CASES, strict=True):
        keys = {} if "rope_parameters" in VARIANTS[variant] else {"rope_parameters": dict(OTHER_ROPE)}
        if "rope_parameters" in VARIANTS[variant]:
            keys = {"rope_parameters": {**VARIANTS[variant]["rope_parameters"], "rope_theta": 25000.0}}
        folder = make_dense(root / f"{name}-dense", variant, **keys)
        if target:
            recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": target, **given})
            split(folder, root / f"{name}-moe", recipe, verify=False)
            AutoModelForCausalLM.from_pretrained(root / f"{name}-moe").save_pretrained(root / name)
            folder = root / name
        found[name] = folder
    return found


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(3, 51)[None]
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_every_target_and_family_is_tried():
    older = {target.name for target in TARGETS if not target.only_five}
    assert {target for target, _, _ in CASES if target} == older - {"dense"}  # dense ones have no target
    families = {source.name for source in SOURCES if not source.only_five}
    assert {VARIANTS[v]["model_type"] for target, v, _ in CASES if not target} == families


@pytest.mark.parametrize("name", IDS)
def test_both_spellings_stand_in_the_file_and_transformers_5_sees_no_change(saved, name):
    folder = saved[name]
    before, loaded, want = config_of(folder), AutoConfig.from_pretrained(folder), logits(folder)
    assert "rope_theta" not in before  # or there is nothing to mend any more
    planned = fix_config(folder, dry_run=True)
    assert config_of(folder) == before
    assert fix_config(folder) == planned
    after = config_of(folder)
    assert {key: after[key] for key in before} == before
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"] == 25000.0
    assert after["torch_dtype"] == before["dtype"]
    assert [line.split(":")[0] for line in planned.added] == [key for key in after if key not in before]
    assert fix_config(folder) == Fixes([], {})
    assert not list(folder.glob("*.tmp"))
    again = AutoConfig.from_pretrained(folder).rope_parameters
    assert {k: v for k, v in again.items() if k != "type"} == loaded.rope_parameters  # "type": rope_type's old name
    assert torch.equal(logits(folder), want)


def test_what_each_needs_beyond_the_base(saved):
    for folder in saved.values():
        fix_config(folder)
    assert config_of(saved["qwen3-qwen3_moe"])["num_experts"] == 4
    assert config_of(saved["phi3-partial-glm4_moe"])["partial_rotary_factor"] == 0.5
    assert config_of(saved["llama-llama3-rope-glm4_moe"])["partial_rotary_factor"] == 1.0
    assert config_of(saved["llama-llama3-rope-mixtral"])["rope_scaling"]["factor"] == LLAMA3_ROPE["factor"]
    assert config_of(saved["phi3-longrope-mixtral"])["original_max_position_embeddings"] == 32
    assert set(config_of(saved["phi3-longrope-dense"])["rope_scaling"]) == {"type", "short_factor", "long_factor"}


def test_what_split_writes_needs_nothing(tmp_path):
    for target in (each.name for each in TARGETS if not each.only_five):
        dense = make_dense(tmp_path / f"{target}-dense", variant_for(target))
        (tmp_path / "text.txt").write_text("some words to look at. " * 40)
        method = (
            {"method": "static", "shared": 0.5, "calibration": str(tmp_path / "text.txt")}
            if target == "dense"
            else {"method": "random", "num_experts": 2 if target == "jetmoe" else 4}
        )
        split(dense, tmp_path / target, llamamoe.load_recipe(given={"target": target, **method}), verify=False)
        assert fix_config(tmp_path / target) == Fixes([], {})


def in_memory(target: str, path: Path, **kwargs: str) -> tuple[Path, Path]:
    """A conversion, and the same saved under the names that transformers 5 uses in memory."""
    dense = make_dense(path / "dense", variant_for(target))
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": target})
    split(dense, path / "moe", recipe, verify=False)
    model = AutoModelForCausalLM.from_pretrained(path / "moe")
    model.save_pretrained(path / "fused", save_original_format=False, **kwargs)
    return path / "moe", path / "fused"


def names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in read_header(file)}


@pytest.mark.parametrize("target", sorted(t.name for t in TARGETS if t.name in FFN_TARGETS and not t.only_five))
def test_names_of_memory_become_those_of_files(tmp_path, target):
    moe, fused = in_memory(target, tmp_path)
    want, before = logits(fused), (fused / "model.safetensors").read_bytes()
    assert names(fused) != names(moe)
    planned = fix_config(fused, dry_run=True)
    assert (fused / "model.safetensors").read_bytes() == before
    assert fix_config(fused) == planned
    assert planned.renamed == {"model.safetensors": len(names(moe))}
    assert names(fused) == names(moe)
    assert torch.equal(logits(fused), want)
    assert fix_config(fused) == Fixes([], {})


def test_renaming_that_is_stopped_between_two_files_is_finished(tmp_path, monkeypatch):
    moe, fused = in_memory("mixtral", tmp_path, max_shard_size="100KB")
    want, files = logits(fused), sorted(fused.glob("*.safetensors"))
    assert len(files) > 2
    real = os.replace

    def stop(temporary: Path, path: Path) -> None:
        if path == files[1]:
            raise KeyboardInterrupt
        real(temporary, path)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        fix_config(fused)
    assert names(fused) != names(moe)
    assert torch.equal(logits(fused), want)  # transformers 5 reads the mixture too
    assert "rope_theta" not in config_of(fused)
    monkeypatch.undo()
    assert len(fix_config(fused).renamed) == len(files) - 1
    assert names(fused) == names(moe)
    assert torch.equal(logits(fused), want)
    assert config_of(fused)["rope_theta"]
    assert set(json.loads((fused / "model.safetensors.index.json").read_text())["weight_map"]) == names(moe)


def test_a_disk_without_room_for_renaming(tmp_path, monkeypatch):
    _, fused = in_memory("mixtral", tmp_path)
    monkeypatch.setattr("llamamoe.checkpoint.renaming.free_bytes", lambda *_, **__: 1000)
    before = (fused / "config.json").read_bytes(), (fused / "model.safetensors").read_bytes()
    with pytest.raises(RefusedError, match="room for a copy"):
        fix_config(fused)
    assert ((fused / "config.json").read_bytes(), (fused / "model.safetensors").read_bytes()) == before


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "bert"},
        {"model_type": "llama", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"model_type": "phi3", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"model_type": "qwen2_moe", "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "qwen2_moe", "head_dim": 32, "num_attention_heads": 4, "hidden_size": 64},
        {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_what_4_57_cannot_hold_is_refused(tmp_path, keys):
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(RefusedError):
        fix_config(tmp_path)
    assert config_of(tmp_path) == keys


def test_the_old_spelling_alone_is_left_alone():
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert missing_keys(old) == {}


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_broken_folder_is_one_clear_error(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(LlamaMoeError, match=r"config\.json"):
        fix_config(tmp_path)


CHECK = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with torch.inference_mode():
        found = model.eval()(torch.arange(3, 51)[None]).logits
    want = torch.load(folder + ".logits")
    error = float((found - want).abs().max() / want.abs().max())
    assert error < 1e-5, (folder, error)
"""


@pytest.mark.skipif("LLAMAMOE_TRANSFORMERS4_PYTHON" not in os.environ, reason="no environment with transformers 4.57")
def test_transformers_4_57_computes_the_same_logits(saved):
    folders = [*saved.values()]
    for folder in folders:
        torch.save(logits(folder), f"{folder}.logits")
        fix_config(folder)
    run = subprocess.run(
        [os.environ["LLAMAMOE_TRANSFORMERS4_PYTHON"], "-c", CHECK, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_tokenizer_that_transformers_5_saved(tmp_path):
    make_byte_level(make_dense(tmp_path / "dense", vocab_size=300))
    moe = tmp_path / "moe"
    split(tmp_path / "dense", moe, llamamoe.load_recipe(given={"method": "random", "num_experts": 4}), verify=False)
    saved = AutoTokenizer.from_pretrained(moe)
    saved.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    saved.chat_template = "{{ messages }}"
    saved.save_pretrained(moe)
    path = moe / "tokenizer_config.json"
    before = json.loads(path.read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"  # 4.57 has no such class
    assert isinstance(before["extra_special_tokens"], list)  # 4.57 wants a mapping
    assert fix_config(moe, dry_run=True).tokenizer
    assert json.loads(path.read_text()) == before
    assert fix_config(moe).tokenizer
    after = json.loads(path.read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in after
    assert difference(saved, AutoTokenizer.from_pretrained(moe)) is None
    assert fix_config(moe) == Fixes([], {})


def test_what_the_older_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "smollm3")
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": "granitemoe_swa"})
    moe = split(dense, tmp_path / "moe", recipe, verify=False).out
    with pytest.raises(RefusedError, match=r"4\.57 does not have the architecture granitemoe_swa"):
        fix_config(moe)
    with pytest.raises(RefusedError, match=r"--require 4\.57: granitemoe_swa needs transformers 5"):
        llamamoe.plan_conversion(dense, recipe.model_copy(update={"require": "4.57"}))


def test_a_scaled_rope_of_olmo2_is_refused(tmp_path: Path) -> None:
    """The older class accepts a type and a factor only, under names that transformers 5 does not write."""
    dense = make_dense(tmp_path / "dense", "olmo2-llama3-rope")
    with pytest.raises(RefusedError, match="no llama3 rope for olmo2"):
        fix_config(dense)
    given = {"method": "static", "shared": 0.5, "shared_by": "weight_norm", "require": "4.57"}
    with pytest.raises(RefusedError, match="dense needs transformers 5"):
        llamamoe.plan_conversion(dense, llamamoe.load_recipe(given=given))
