"""A folder is read as transformers reads it, or refused; one that changes while it is read is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

import llamamoe
from tests.dense import make_dense

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "dense", "llama-tied")


def split(source: Path, out: Path, **keys: Any) -> Path:
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2})
    return llamamoe.split(source, out, recipe, **({"verify": False} | keys)).out


def logits(folder: Path) -> torch.Tensor:
    """Of all experts at equal weights, by transformers."""
    config = {"num_experts_per_tok": 4} if "mixtral" in (folder / "config.json").read_text() else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name or ".router." in name:
                parameter.zero_()
        return model(torch.arange(3, 30)[None]).logits


def same(one: Path, other: Path) -> bool:
    mine, theirs = logits(one), logits(other)
    return bool((mine - theirs).abs().max() < 1e-5 * theirs.abs().max())


def test_the_single_file_comes_before_an_index(dense: Path, tmp_path: Path) -> None:
    older = make_dense(tmp_path / "older", "llama-tied", seed=1, max_shard_size="100KB")
    for path in older.glob("model-*"):
        shutil.copy(path, dense)
    shutil.copy(older / INDEX, dense)
    out = split(dense, tmp_path / "out")
    assert same(out, dense)
    assert not same(out, older)
    receipt = json.loads((out / "llamamoe_receipt.json").read_text())
    assert any(INDEX in note for note in receipt["source"]["notes"])


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused(dense: Path, tmp_path: Path, beside: bool) -> None:
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    if not beside:
        (dense / "config.json").unlink()
    with pytest.raises(llamamoe.LlamaMoeError, match="PEFT adapter") as caught:
        split(dense, tmp_path / "out")
    assert "merge_and_unload" in str(caught.value)
    assert beside or "org/base" in str(caught.value)


def test_a_tied_model_that_save_model_wrote(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    save_model(model, str(dense / SINGLE), metadata={"format": "pt"})
    assert "lm_head.weight" in load_file(dense / SINGLE)
    assert "model.embed_tokens.weight" not in load_file(dense / SINGLE)
    assert same(split(dense, tmp_path / "out", verify=True), dense)


@pytest.mark.parametrize(
    ("prefix", "words"), [("_orig_mod.", "torch.compile"), ("module.", "DataParallel"), ("base_model.model.", "PEFT")]
)
def test_wrapped_models_are_named(dense: Path, tmp_path: Path, prefix: str, words: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in load_file(dense / SINGLE).items()}
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    with pytest.raises(llamamoe.LlamaMoeError, match=words):
        split(dense, tmp_path / "out")


def test_a_model_saved_without_its_head(dense: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(dense).model.save_pretrained(tmp_path / "base")
    keys = {name.split(".")[0] for name in load_file(tmp_path / "base" / SINGLE)}
    assert keys == {"embed_tokens", "layers", "norm"}
    assert same(split(tmp_path / "base", tmp_path / "out", verify=True), dense)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "granitemoeshared", "glm4_moe", "ernie4_5_moe"])
def test_outputs_under_the_names_of_memory_are_read(dense: Path, tmp_path: Path, target: str) -> None:
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, "target": target})
    out = llamamoe.split(dense, tmp_path / "out", recipe, verify=False).out
    saved = Path(shutil.copytree(out, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors")))
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(saved, save_original_format=False)
    (saved / "config.json").write_text((out / "config.json").read_text())
    assert load_file(saved / SINGLE).keys() != load_file(out / SINGLE).keys()
    here, there = (llamamoe.retop(folder, tmp_path / f"{folder.name}-3", top_k=3).out for folder in (out, saved))
    assert same(here, there)


def linked(dense: Path, folder: Path) -> Path:
    """A folder of links to the files of a hub cache's snapshot, themselves links to its blobs."""
    snapshot, blobs = dense.parent / "cache" / "snapshots" / "0123", dense.parent / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    folder.mkdir()
    for number, path in enumerate(sorted(dense.iterdir())):
        shutil.copy(path, blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
        (folder / path.name).symlink_to(snapshot / path.name)
    return folder


def test_links_lead_into_permitted_folders_only(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = linked(dense, tmp_path / "links")
    assert same(split(tmp_path / "cache" / "snapshots" / "0123", tmp_path / "out"), dense)
    monkeypatch.setenv("LLAMAMOE_LINKS_INTO", f"{tmp_path / 'elsewhere'}{os.pathsep}")
    with pytest.raises(llamamoe.CheckpointError, match="symbolic link out of the folder") as caught:
        split(source, tmp_path / "out2")
    assert f"LLAMAMOE_LINKS_INTO={tmp_path / 'cache' / 'blobs'}" in str(caught.value)
    monkeypatch.setenv("LLAMAMOE_LINKS_INTO", f"{tmp_path / 'elsewhere'}{os.pathsep}{tmp_path / 'cache'}")
    assert same(split(source, tmp_path / "out2"), dense)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(llamamoe.CheckpointError, match="another user's file"):
        split(source, tmp_path / "out3")


def test_a_pointer_of_git_lfs_is_called_one(dense: Path, tmp_path: Path) -> None:
    (dense / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(llamamoe.LlamaMoeError, match="Git LFS pointer") as caught:
        split(dense, tmp_path / "out")
    assert "git lfs pull" in str(caught.value)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")


def replace_by_copy(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("how", [rewrite, replace_by_copy, truncate, Path.unlink])
def test_a_source_that_changes_is_noticed(dense: Path, tmp_path: Path, how: Callable[[Path], None]) -> None:
    done: list[Any] = []

    def progress(step: Any) -> None:
        if step.stage == "convert" and not done:
            done.append(how(dense / SINGLE))

    with pytest.raises(llamamoe.LlamaMoeError, match=r"model\.safetensors changed while it was read"):
        split(dense, tmp_path / "out", progress=progress)
    assert done
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer_config.json", "additional_chat_templates", "additional_chat_templates/tool.jinja"]
)
def test_small_files_that_change_are_noticed(dense: Path, tmp_path: Path, name: str) -> None:
    folder = dense / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool.jinja").write_text("one")
    file = folder / "more.jinja" if name == folder.name else dense / name

    def progress(step: Any) -> None:
        if step.stage == "convert":
            file.write_text("{}")

    with pytest.raises(llamamoe.LlamaMoeError, match=f"{name} changed while it was read"):
        split(dense, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [rewrite, truncate, Path.unlink])
def test_a_source_that_changes_while_the_result_is_compared_is_called_so(
    dense: Path, tmp_path: Path, how: Callable[[Path], None]
) -> None:
    done: list[Any] = []

    def progress(step: Any) -> None:
        if step.stage == "run parent" and not done:
            done.append(how(dense / SINGLE))

    with pytest.raises(llamamoe.LlamaMoeError, match=r"model\.safetensors changed while it was read"):
        split(dense, tmp_path / "out", verify=True, progress=progress)
    assert done
    assert not (tmp_path / "out").exists()
