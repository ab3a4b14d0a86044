"""Broken, unsafe and foreign files in the source folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llamamoe
from tests.dense import make_dense

from .conftest import Refused, digests, edit_config, edit_weights, recipe, shard

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
GATE = "model.layers.1.mlp.gate_proj.weight"


def test_shards_convert_to_the_same_weights(source: Path, tmp_path: Path) -> None:
    one = llamamoe.split(source, tmp_path / "one", recipe(), verify=False)
    other = llamamoe.split(shard(source, 3), tmp_path / "other", recipe(), verify=False)
    assert one.receipt["weights_sha256"] == other.receipt["weights_sha256"]
    assert digests(one.out)["model.safetensors"] == digests(other.out)["model.safetensors"]


# ---- shards --------------------------------------------------------------------------------------------------------


def test_missing_shard(sharded: Path, refused: Refused) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, SECOND, "missing", "Download the checkpoint again")


def test_missing_only_file(source: Path, refused: Refused) -> None:
    (source / "model.safetensors").unlink()
    refused(source, "holds neither model.safetensors nor", "It holds: config.json")


@pytest.mark.parametrize("keep", [0, 3, 8, 9, 100, -1, -4096])
def test_truncated_shard(sharded: Path, refused: Refused, keep: int) -> None:
    data = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(data[:keep])
    refused(sharded, SECOND, "truncated" if keep else "is empty (0 bytes)", "Download it again")


def test_shard_with_a_tail(sharded: Path, refused: Refused) -> None:
    with (sharded / FIRST).open("ab") as file:
        file.write(b"\0" * 16)
    refused(sharded, FIRST, "longer than its header states")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 10_000_000])
def test_absurd_header_length(source: Path, refused: Refused, length: int) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(source, "model.safetensors", f"claims {length:,} bytes", "Download it again")


def test_shard_is_a_folder(sharded: Path, refused: Refused) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).mkdir()
    refused(sharded, SECOND)


# ---- the index -----------------------------------------------------------------------------------------------------


def point(folder: Path, file: Any) -> None:
    """Let the index name ``file`` for one tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][GATE] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a/../b", "a\0b"],
)
def test_index_names_a_file_outside(sharded: Path, refused: Refused, name: str) -> None:
    shutil.copyfile(sharded / FIRST, sharded.parent / "elsewhere.safetensors")
    point(sharded, name)
    refused(sharded, repr(name), "not a plain file name")


@pytest.mark.parametrize("metadata", [5, "x", [1], None])
def test_index_whose_metadata_transformers_refuses(sharded: Path, refused: Refused, metadata: Any) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps(index | {"metadata": metadata}))
    refused(sharded, INDEX, "metadata")


def test_index_names_a_missing_file(sharded: Path, refused: Refused) -> None:
    point(sharded, "gone.safetensors")
    refused(sharded, "gone.safetensors", "missing")


def test_index_names_the_wrong_file(sharded: Path, refused: Refused) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    point(sharded, FIRST if index[GATE] == SECOND else SECOND)
    refused(sharded, GATE, "which does not contain it")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_broken_index(sharded: Path, refused: Refused, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


# ---- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", FIRST, INDEX, "tokenizer.json", "generation_config.json", "LICENSE"])
def test_link_out_of_the_folder(sharded: Path, refused: Refused, name: str) -> None:
    outside = sharded.parent / "outside"
    outside.mkdir()
    (sharded / name).touch()
    shutil.move(sharded / name, outside / name)
    (sharded / name).symlink_to(outside / name)
    refused(sharded, name, "symbolic link out of the folder", "Copy the file into the folder")


@pytest.mark.parametrize("name", ["config.json", FIRST])
def test_link_that_loops(sharded: Path, refused: Refused, name: str) -> None:
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    refused(sharded, name)


def test_link_inside_the_folder_is_fine(sharded: Path) -> None:
    (sharded / "blob").write_bytes((sharded / FIRST).read_bytes())
    (sharded / FIRST).unlink()
    (sharded / FIRST).symlink_to("blob")
    llamamoe.plan_conversion(sharded, recipe())


def test_links_into_the_blobs_of_a_hub_cache_are_fine(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(sharded.iterdir())):
        shutil.move(file, blobs / f"{i:x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:x}")
    result = llamamoe.split(snapshot, tmp_path / "out", recipe(), verify=False)
    assert not any(p.is_symlink() for p in result.out.iterdir())
    outside = tmp_path / "hub" / "other.json"
    outside.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside)
    with pytest.raises(llamamoe.CheckpointError, match="symbolic link out"):
        llamamoe.plan_conversion(snapshot)


def test_source_that_is_a_link_to_a_folder_is_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    llamamoe.plan_conversion(tmp_path / "link", recipe())


def test_source_that_is_no_checkpoint(tmp_path: Path, source: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json", "It holds: nothing")
    make_dense(tmp_path / "models" / "small")
    refused(tmp_path / "models", "no config.json", f"Did you mean '{tmp_path / 'models' / 'small'}'?")
    refused(source / "model.safetensors", "neither a folder nor a .gguf file", "the folder that holds config.json")
    refused(tmp_path / "nowhere", "does not exist", "Hub id")
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    refused(source, "config.json")


# ---- names, shapes, dtypes -----------------------------------------------------------------------------------------


def test_duplicate_name_in_a_header(source: Path, refused: Refused) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    head = f'{{"a":{entry},"a":{entry}}}'.encode()
    (source / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\0" * 4)
    refused(source, "model.safetensors", "'a' appears twice")


def test_duplicate_name_across_shards(sharded: Path, refused: Refused) -> None:
    shutil.copyfile(sharded / FIRST, sharded / "more.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra"] = "more.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, FIRST, "more.safetensors", "again in")


def test_wrong_shape(source: Path, refused: Refused) -> None:
    edit_weights(source, lambda t: t.update({GATE: t[GATE][:100]}))
    refused(source, GATE, "[100, 64]", "[172, 64]", "config and weights disagree")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_wrong_dtype(source: Path, refused: Refused, dtype: torch.dtype) -> None:
    edit_weights(source, lambda t: t.update({GATE: t[GATE].to(dtype)}))
    refused(source, GATE, "is stored as", "F64, F32, F16, BF16", "Use the unquantised checkpoint")


def test_missing_tensors(source: Path, refused: Refused) -> None:
    edit_weights(source, lambda t: t.pop(GATE))
    refused(source, GATE, "missing", "config and weights disagree")


def test_surplus_tensors(source: Path, refused: Refused) -> None:
    edit_weights(source, lambda t: t.update({"model.layers.0.mlp.gate_proj.lora_A": torch.ones(2, 2)}))
    refused(source, "lora_A", "do not belong to the architecture", "would not be exact")


def test_fewer_layers_in_the_configuration(source: Path, refused: Refused) -> None:
    edit_config(source, num_hidden_layers=1)
    refused(source, "model.layers.1.", "do not belong")


def test_more_layers_in_the_configuration(source: Path, refused: Refused) -> None:
    edit_config(source, num_hidden_layers=3)
    refused(source, "model.layers.2.", "missing")


def test_buffers_of_old_transformers_are_ignored(source: Path) -> None:
    edit_weights(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    llamamoe.plan_conversion(source, recipe())


def test_head_beside_a_tied_embedding_is_kept(source: Path, tmp_path: Path) -> None:
    """Transformers 5 does not tie two tensors that differ, whatever the configuration says."""
    edit_config(source, tie_word_embeddings=True)
    result = llamamoe.split(source, tmp_path / "out", recipe())
    assert json.loads((result.out / "config.json").read_text())["tie_word_embeddings"] is False
    assert result.receipt["verification"]["passed"]


# ---- foreign checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_by_configuration(source: Path, refused: Refused, method: str) -> None:
    edit_config(source, quantization_config={"quant_method": method, "bits": 4})
    refused(source, f"quantised ({method})", "Use the unquantised checkpoint")


@pytest.mark.parametrize(
    ("drop", "add"),
    [
        (True, {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}),  # GPTQ, AWQ
        (False, {"weight_scale_inv": torch.float32}),  # fp8
        (False, {"SCB": torch.float32}),  # bitsandbytes, 8 bit
        (False, {"weight.absmax": torch.float32, "weight.quant_map": torch.float32}),  # bitsandbytes, 4 bit
        (True, {"weight_packed": torch.int32, "weight_scale": torch.float16}),  # compressed-tensors
    ],
)
def test_quantised_by_tensors(source: Path, refused: Refused, drop: bool, add: dict[str, torch.dtype]) -> None:
    """Nothing in the configuration says so; the names of the tensors do."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        prefix = GATE.removesuffix("weight")
        tensors.update({prefix + name: torch.ones(4, 4).to(dtype) for name, dtype in add.items()})
        if drop:
            del tensors[GATE]

    edit_weights(source, change)
    refused(source, "quantised", "Use the unquantised checkpoint")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickle_only(source: Path, refused: Refused, file: str) -> None:
    (source / "model.safetensors").rename(source / file)
    refused(source, file, "pickle", "save_pretrained")


def test_folder_of_gguf(source: Path, refused: Refused) -> None:
    (source / "config.json").unlink()
    (source / "model.gguf").touch()
    refused(source, "no config.json", "name the file itself", "model.gguf")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "its FFN has no gate"),
        ("mamba", "not a dense family"),
        ("lama", "not a dense family"),
        ("mixtral", "not a dense family"),
    ],
)
def test_unknown_architecture(source: Path, refused: Refused, name: str, reason: str) -> None:
    edit_config(source, model_type=name)
    refused(source, repr(name), reason, "Known: cohere, cohere2, ernie4_5, gemma")


@pytest.mark.parametrize("name", [None, 5, ["llama"], {"a": 1}])
def test_an_architecture_that_is_not_a_name(source: Path, refused: Refused, name: Any) -> None:
    edit_config(source, model_type=name)
    refused(source, f"model_type = {name!r}", "must be a name")


def test_unknown_architecture_names_the_known_ones(source: Path, refused: Refused) -> None:
    edit_config(source, model_type="stablelm")
    assert "Did you mean" not in str(
        refused(source, "model_type 'stablelm'", "Known: cohere, cohere2, ernie4_5, gemma")
    )


def test_custom_code(source: Path, refused: Refused) -> None:
    edit_config(source, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    refused(source, "config.json has an 'auto_map'", "never run", "transformers' own")


def test_custom_code_of_the_tokenizer(source: Path, refused: Refused) -> None:
    file = source / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tok.Evil", None]}}
    file.write_text(json.dumps(config))
    refused(source, "tokenizer_config.json has an 'auto_map'", "never run")


@pytest.mark.parametrize("text", ["", "[]", "{", '"a"', "[" * 100_000])
def test_broken_tokenizer_config(source: Path, refused: Refused, text: str) -> None:
    (source / "tokenizer_config.json").write_text(text)
    refused(source, "tokenizer_config.json")


@pytest.mark.parametrize(
    "keys",
    [
        {"num_local_experts": 8},
        {"num_experts": 8, "num_experts_per_tok": 2},
        {"n_routed_experts": 64},
        {"moe_num_experts": 16},
    ],
)
def test_already_a_mixture(source: Path, refused: Refused, keys: dict[str, int]) -> None:
    edit_config(source, **keys)
    refused(source, next(iter(keys)), "already a mixture of experts", "Give the dense model")


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "granitemoeshared", "ernie4_5_moe", "glm4_moe"])
def test_converted_twice(source: Path, tmp_path: Path, target: str) -> None:
    first = llamamoe.split(source, tmp_path / "first", recipe(target=target), verify=False)
    with pytest.raises(llamamoe.CheckpointError, match="already a mixture of experts"):
        llamamoe.plan_conversion(first.out)


# ---- weights that are not finite -----------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "name",
    [GATE, "model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.layers.0.post_attention_layernorm.weight"],
)
def test_nonfinite_is_warned_about(source: Path, tmp_path: Path, value: float, name: str) -> None:
    edit_weights(source, lambda t: t[name].view(-1)[5:6].fill_(value))
    result = llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    assert any("NaN or infinite" in w for w in result.warnings)
    assert "NaN or infinite" in (result.out / "README.md").read_text()
    json.loads((result.out / "llamamoe_receipt.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("value", BAD)
def test_strict_refuses_nonfinite(source: Path, refused: Refused, value: float) -> None:
    edit_weights(source, lambda t: t[GATE][0:1, 0:1].fill_(value))
    refused(source, GATE, "NaN or infinite", "Without --strict", strict=True)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("method", "shared"), [("kmeans", 0), ("cluster_shared", 0.25)])
def test_nonfinite_rows_can_be_clustered(
    source: Path, tmp_path: Path, value: float, method: str, shared: float
) -> None:
    edit_weights(source, lambda t: t[GATE][0:1, 0:1].fill_(value))
    result = llamamoe.split(source, tmp_path / "out", recipe(method=method, shared=shared), verify=False)
    assert any("NaN or infinite" in w for w in result.warnings)


def test_strict_passes_a_clean_source(source: Path, tmp_path: Path) -> None:
    result = llamamoe.split(source, tmp_path / "out", recipe(strict=True), verify=False)
    assert result.warnings == ()
    assert os.listdir(result.out)
