"""The dense parent: what it is refused for, what it answers, which memory it shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.errors import CheckpointError, RefusedError
from llamamoe.training.parent import Parent, load_parent, share_frozen
from tests.dense import make_dense, make_tokenizer
from tests.training.tiny_moe import tiny_moe

IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("parents") / "dense", "granite")


def opened(folder: Path, **keys: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **keys)


def test_it_answers_as_the_model_does_without_gradients(folder: Path) -> None:
    parent, model = load_parent(folder, folder, dtype="float32"), opened(folder)
    batch = {"input_ids": IDS, "use_cache": True, "domains": None}
    with torch.autocast("cpu", torch.bfloat16):  # the student's business
        states = parent.hidden(batch, after=[0], ffn_inputs=[1])
        logits = parent.logits(states.last_BTH)
    wanted = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(logits, wanted.logits)
    torch.testing.assert_close(states.after[0], wanted.hidden_states[1])
    assert set(states.after) == {0}
    assert not logits.requires_grad
    last = model.model.layers[1]
    torch.testing.assert_close(
        parent.ffn(1, states.ffn_inputs[1]), 0.5 * last.mlp(states.ffn_inputs[1])
    )  # residual_multiplier
    assert not parent.model.training
    assert not any(p.requires_grad for p in parent.model.parameters())
    assert not parent.model.model.layers[0]._forward_hooks


def test_bfloat16_is_the_default(folder: Path) -> None:
    parent = load_parent(folder, folder)
    assert {p.dtype for p in parent.model.parameters()} == {torch.bfloat16}
    assert parent.hidden({"input_ids": IDS}).last_BTH.dtype == torch.bfloat16


def test_ffns_are_all_that_stays_if_nothing_else_is_asked(folder: Path) -> None:
    parent = load_parent(folder, folder, dtype="float32")
    x = torch.randn(3, 64)
    before = parent.ffn(0, x)
    parent.keep_ffns_only()
    assert torch.equal(parent.ffn(0, x), before)
    assert not hasattr(parent, "model")


def test_gradients_go_through_an_ffn_to_its_input(folder: Path) -> None:
    parent, model = load_parent(folder, folder, dtype="float32"), opened(folder)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (mine,) = torch.autograd.grad(parent.ffn(0, x).square().sum(), x)
    (theirs,) = torch.autograd.grad((0.5 * model.model.layers[0].mlp(x)).square().sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_another_vocabulary_or_tokenizer_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    larger = make_dense(tmp_path / "larger", vocab_size=130)
    with pytest.raises(RefusedError, match=r"dense' has 128 tokens .*larger' has 130"):
        load_parent(folder, larger)
    other = make_dense(tmp_path / "other")
    make_tokenizer(other, 100)
    with pytest.raises(RefusedError, match=r"dense' has another tokenizer .*other'"):
        load_parent(folder, other)


def test_files_are_checked_before_weights_are_loaded(folder: Path, tmp_path: Path) -> None:
    coded = make_dense(tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(CheckpointError, match="own code"):
        load_parent(coded, folder)
    pickled = make_dense(tmp_path / "pickled")
    torch.save(opened(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_parent(pickled, folder)
    mixture = tmp_path / "mixture"
    tiny_moe("mixtral").save_pretrained(mixture)
    with pytest.raises(CheckpointError, match="already a mixture"):
        load_parent(mixture, folder)


class Adapter(torch.nn.Module):
    """As peft names what it wraps."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x)
        return out


def test_equal_frozen_tensors_are_held_once_and_training_the_rest_changes_no_answer(folder: Path) -> None:
    parent, student = Parent(opened(folder)), opened(folder)
    student.requires_grad_(False)
    attention, ffn = student.model.layers[0].self_attn, student.model.layers[0].mlp
    attention.q_proj = Adapter(attention.q_proj)
    ffn.requires_grad_(True)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3  # frozen, but another number
        student.model.layers[1].mlp.up_proj.weight.neg_().neg_()  # equal again
    wrapped = torch.nn.ModuleDict({"module": student})
    before = parent.logits(parent.hidden({"input_ids": IDS}).last_BTH)

    report = share_frozen(parent, wrapped)

    theirs = dict(opened(folder).named_parameters())
    alone = {n for n in theirs if n.startswith("model.layers.0.mlp")} | {"model.layers.1.mlp.down_proj.weight"}
    assert set(report.names) == set(theirs) - alone
    assert report.bytes_shared == sum(theirs[name].nbytes for name in report.names)
    mine = dict(parent.model.named_parameters())
    assert mine["model.layers.0.self_attn.q_proj.weight"].data_ptr() == attention.q_proj.base_layer.weight.data_ptr()
    assert mine["model.embed_tokens.weight"].data_ptr() == student.model.embed_tokens.weight.data_ptr()
    assert parent.model.lm_head.weight is parent.model.model.embed_tokens.weight  # tied as before
    assert mine["model.layers.0.mlp.up_proj.weight"].data_ptr() != ffn.up_proj.weight.data_ptr()
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    student(IDS, labels=IDS).loss.backward()
    optimiser.step()
    assert not torch.equal(ffn.up_proj.weight, theirs["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(parent.logits(parent.hidden({"input_ids": IDS}).last_BTH), before)
    assert share_frozen(parent, wrapped).bytes_shared == 0  # once is enough


def test_another_dtype_is_not_shared(folder: Path) -> None:
    student = opened(folder).requires_grad_(False)
    assert share_frozen(Parent(opened(folder, dtype=torch.bfloat16)), student).names == ()
