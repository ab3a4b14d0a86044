"""Train a checkpoint for two steps as ``recipes/launch/megatron_bridge.py`` configures it, on a CPU, and write it back.

    python train_megatron.py MODEL TOKENS RUN OUT

Takes the configuration, the data and the model from Megatron-Bridge; its training loop needs a GPU, so the steps are
taken here. Prints one line of JSON: the loss of each step, and what transformers computes of the first batch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from run_megatron import PLAIN, local_experts, megatron_model, prepare
from transformers import AutoModelForCausalLM

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch" / "megatron_bridge.py"
STEPS, SEQUENCES, LENGTH = 2, 2, 24


def launcher() -> ModuleType:
    """Import the script."""
    spec = importlib.util.spec_from_file_location("launcher", LAUNCH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batches(config: Any) -> Any:
    """Return the blended training set of Megatron-Core."""
    from megatron.bridge.data.utils import pretrain_train_valid_test_datasets_provider
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    config.dataset.tokenizer = build_tokenizer(config.tokenizer)
    train, valid, _ = pretrain_train_valid_test_datasets_provider([STEPS * SEQUENCES, SEQUENCES, 0], config.dataset)
    assert len(valid) >= SEQUENCES
    return train


def main() -> None:
    """Train, save and print."""
    warnings.filterwarnings("ignore")
    folder, tokens, run, out = map(Path, sys.argv[1:])
    prepare()
    from megatron.bridge import AutoBridge

    overrides = [f"train.train_iters={STEPS}", f"model.seq_length={LENGTH}", f"train.global_batch_size={SEQUENCES}"]
    overrides += ["model.expert_model_parallel_size=1", "mixed_precision=null", "scheduler.lr_warmup_iters=1"]
    overrides += [f"model.{key}={str(value).lower()}" for key, value in PLAIN.items() if isinstance(value, bool)]
    config = launcher().configure(folder, tokens, run, LAUNCH.with_suffix(".yaml"), overrides)
    config.validate()
    data = batches(config)
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    local_experts(type(bridge._model_bridge))
    model = megatron_model(bridge).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    losses, theirs = [], None
    for step in range(STEPS):
        rows = [data[step * SEQUENCES + row] for row in range(SEQUENCES)]
        ids, labels, places = (torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "position_ids"))
        if theirs is None:
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        loss = model(ids, places, mask, labels=labels).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bridge.save_hf_pretrained([model], out, show_progress=False)
    sys.stdout.write(json.dumps({"losses": losses, "transformers": theirs}) + "\n")


if __name__ == "__main__":
    main()
