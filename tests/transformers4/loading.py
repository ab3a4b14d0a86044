"""Loads folders with transformers 4.57, in the interpreter that ``LLAMAMOE_TRANSFORMERS4_PYTHON`` names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe.checkpoint.tokenizer_difference import PROBES

PYTHON = os.environ.get("LLAMAMOE_TRANSFORMERS4_PYTHON")


def run_older(folders: list[Path]) -> dict[str, Any]:
    """Return the output of `check.py` for every folder, by its name."""
    script = Path(__file__).with_name("check.py")
    done = subprocess.run([PYTHON or "", script, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def expect_logits(folder: Path) -> None:
    """Leave beside a checkpoint what it must compute, by the transformers that runs here."""
    ids = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids_of = {text: [tokenizer(text).input_ids, tokenizer.decode(tokenizer(text).input_ids)] for text in PROBES}
        (folder / "expected_ids.json").write_text(json.dumps(ids_of))
    with torch.no_grad():
        torch.save({"input_ids": ids, "logits": model(ids).logits}, folder / "expected.pt")
