"""Implementations are registered with transformers, and saved models do not name them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llamamoe.models.experts import EXPERTS, auto, register_experts
from llamamoe.models.experts.auto import COSTS, costs_on, one_token_prefers_sorted, prefers_sorted

from .test_implementations import make_model


def test_registering_twice_changes_nothing() -> None:
    names = register_experts()
    functions = [ALL_EXPERTS_FUNCTIONS[name] for name in names]
    assert names == ["llamamoe_auto", "llamamoe_grouped_mm", "llamamoe_masked", "llamamoe_sorted"]
    assert register_experts() == names
    assert [ALL_EXPERTS_FUNCTIONS[name] for name in names] == functions
    assert len(EXPERTS.names()) == len(names)


@pytest.mark.parametrize("name", ["llamamoe_auto", "llamamoe_grouped_mm", "llamamoe_masked", "llamamoe_sorted"])
def test_what_is_saved_is_native(name: str, tmp_path: Path) -> None:
    register_experts()
    model = make_model(dtype=torch.float32)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path / "before")
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path / "before", experts_implementation=name)
    assert chosen.config._experts_implementation == name
    ids = torch.arange(9)[None]
    chosen(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for weight in chosen.parameters():
            weight -= 0.1 * weight.grad
    chosen.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "after").glob("*.json"):
        assert "llamamoe" not in file.read_text()
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("before", "after"))
    assert before == after
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert again.config._experts_implementation in ("grouped_mm", "eager")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, chosen(input_ids=ids).logits)


def test_generation_is_that_of_eager() -> None:
    register_experts()
    model = make_model(dtype=torch.float32).eval()
    ids = torch.tensor([[5, 7, 11]])
    texts = []
    for name in ("eager", "llamamoe_auto", "llamamoe_grouped_mm", "llamamoe_masked", "llamamoe_sorted"):
        model.set_experts_implementation(name)
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=False).tolist())
    assert all(text == texts[0] for text in texts)
    assert len(texts[0][0]) > 6


def test_the_registry_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from llamamoe.models.experts import EXPERTS; names = EXPERTS.names();"
        "assert names == ['auto', 'grouped_mm', 'masked', 'sorted'], names;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("tokens", "sizes", "kind", "sorted_wins"),
    [
        (8, (64, 112, 24, 2048), "half", False),
        (64, (64, 112, 24, 2048), "half", True),
        (8, (16, 448, 6, 2048), "half", True),
        (16, (32, 224, 12, 2048), "half", False),
        (2, (8, 896, 3, 2048), "half", True),
        (4, (16, 448, 6, 2048), "half", True),
        (256, (64, 112, 24, 2048), "half in float32", True),
        (32, (16, 96, 6, 576), "half in float32", False),
        (64, (16, 96, 6, 576), "half in float32", True),
        (64, (64, 24, 24, 576), "half in float32", False),
        (256, (88, 16, 36, 576), "half in float32", False),
        (2048, (88, 16, 36, 576), "half in float32", True),
        (2048, (88, 16, 36, 576), "float32", False),
        (2, (32, 160, 7, 2048), "half by AMX", True),
        (4, (64, 112, 24, 2048), "half by AMX", False),
        (8, (8, 896, 3, 2048), "half by AMX", False),
        (64, (8, 896, 3, 2048), "half by AMX", True),
        (256, (32, 160, 7, 2048), "half by AMX", True),
        (256, (64, 112, 24, 2048), "half by AMX", False),
        (2048, (88, 16, 36, 576), "half by AMX", False),
        (4, (64, 112, 24, 2048), "float32", True),
        (256, (64, 24, 24, 576), "float32", False),
        (256, (16, 96, 6, 576), "float32", True),
        (64, (16, 96, 6, 576), "float32", True),
    ],
)
def test_auto_chooses_what_was_measured_to_be_faster(
    tokens: int, sizes: tuple[int, int, int, int], kind: str, sorted_wins: bool
) -> None:
    """Measured on 2 threads without gradients."""
    assert prefers_sorted(tokens, *sizes, costs=COSTS[kind], threads=2) == sorted_wins


def test_auto_takes_the_costs_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "has_amx", lambda: True)
    assert costs_on("cpu", half=True) is COSTS["half by AMX"]
    assert costs_on("cuda", half=True) is COSTS["half"]
    assert costs_on("cpu", half=True, in_float32=True) is COSTS["half in float32"]
    assert costs_on("cpu", half=False) is COSTS["float32"]
    monkeypatch.setattr(auto, "has_amx", lambda: False)
    assert costs_on("cpu", half=True) is COSTS["half"]


@pytest.mark.parametrize(
    ("sizes", "half", "sorted_wins"),
    [
        ((88, 16, 36, 576), True, False),
        ((64, 24, 24, 576), True, False),
        ((64, 24, 24, 576), False, False),
        ((64, 112, 24, 2048), True, True),
        ((64, 112, 24, 2048), False, True),
        ((8, 192, 2, 576), True, True),
        ((8, 1024, 2, 2048), True, True),
    ],
)
def test_auto_for_one_token(sizes: tuple[int, int, int, int], half: bool, sorted_wins: bool) -> None:
    assert one_token_prefers_sorted(*sizes, half=half) == sorted_wins
