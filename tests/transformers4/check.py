"""Run by an interpreter with transformers 4.57: load checkpoints, compare logits with those expected.

    python check.py FOLDER...

Each folder holds a checkpoint and ``expected.pt`` with ``input_ids`` and ``logits``. Prints one JSON object:
folder name to the largest logit difference over the largest logit, the keys that loading complained
about, and all warnings.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM


class Collect(logging.Handler):
    """Keeps what transformers warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


def check(folder: Path) -> dict:
    """Load with plain transformers and compare."""
    collect = Collect()
    logging.getLogger("transformers").addHandler(collect)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    error = float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max())
    keys = [str(k) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in info[kind]]
    logging.getLogger("transformers").removeHandler(collect)
    return {"error": error, "keys": keys, "warnings": collect.messages}


print(json.dumps({"version": transformers.__version__} | {Path(f).name: check(Path(f)) for f in sys.argv[1:]}))
