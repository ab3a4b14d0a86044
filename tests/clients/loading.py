"""Models for other programs, and what these make of them, in the interpreter that ``LLAMAMOE_CLIENTS_PYTHON`` names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llamamoe.training.moe_layers import MoeLayer, find_moe_layers

PYTHON = os.environ.get("LLAMAMOE_CLIENTS_PYTHON")
STEPS = 12
PROMPTS = 3
CANDIDATES = (
    "Once upon a time", "The dog was happy", "They went home", "One day a boy", "Her mother said", "The sun was red",
    "He put the toy", "A cat sat down", "It was a big", "Lily and Tom", "In the garden", "She saw a bird",
    "There was rain", "Max had a ball", "We like to play", "Ben ran fast",
)  # fmt: skip


def run_client(script: str, folders: list[Path], *, python: str | None = PYTHON) -> dict[str, Any]:
    """Return the results of a runner for every folder, by its name, and the version of its program."""
    path = Path(__file__).with_name(script)
    done = subprocess.run([python or "", path, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@torch.no_grad()
def expect(folder: Path) -> None:
    """Leave beside a checkpoint what it must compute, for prompts whose tokens and experts are far from a tie.

    Near a tie rounding decides, and two programs may differ without either being wrong.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = [tokenizer(text).input_ids for text in CANDIDATES]
    ends = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.arange(len(prompts))
    ids = torch.zeros(
        len(prompts), int(ends.max()) + STEPS, dtype=torch.long
    )  # what stands behind a text changes nothing
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    for step in range(STEPS):
        ids[rows, ends + step] = model(ids).logits[rows, ends + step - 1].argmax(-1)
    found = []
    for text, prompt, row in zip(CANDIDATES, prompts, ids.tolist(), strict=True):
        sequence = row[: len(prompt) + STEPS]
        logits, gap = _logits_and_expert_gap(model, sequence)
        first, second = logits[len(prompt) - 1 : -1].topk(2).values.unbind(-1)
        far = bool((first - second).min() > 2e-3 * logits.abs().max())
        if far and min(sequence[len(prompt) :]) > 2:  # no token that ends a text
            found.append((gap, text, prompt, sequence[len(prompt) :], logits))
    best = sorted(found, key=lambda each: -each[0])[:PROMPTS]
    assert len(best) == PROMPTS, f"{folder.name}: only {len(best)} prompts are far from a tie"
    texts, prompts, greedy = ([each[i] for each in best] for i in (1, 2, 3))
    (folder / "expected.json").write_text(json.dumps({"texts": texts, "prompts": prompts, "greedy": greedy}))
    np.save(folder / "expected.npy", np.concatenate([each[4].numpy() for each in best]))


def _logits_and_expert_gap(model: PreTrainedModel, ids: list[int]) -> tuple[torch.Tensor, float]:
    """``[T, V]``, and the smallest distance of the router's logits k and k + 1 over tokens and layers."""
    gaps, handles = [float("inf")], []
    for moe in find_moe_layers(model) if model.config.model_type not in ("llama", "jetmoe") else ():

        def tap(_: Any, args: tuple[torch.Tensor, ...], __: Any, moe: MoeLayer = moe) -> None:
            inputs_TH = args[0].reshape(-1, moe.router_NH.shape[1])
            ranked = (inputs_TH.double() @ moe.router_NH.double().T).sort(-1, descending=True).values
            gaps.append(float((ranked[:, moe.top_k - 1] - ranked[:, moe.top_k]).min()))

        handles.append(moe.router.register_forward_hook(tap))
    logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, min(gaps)
