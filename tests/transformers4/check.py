"""Run by an interpreter with transformers 4.57: load checkpoints, compare logits with those expected.

    python check.py FOLDER...

Each folder holds a checkpoint and ``expected.pt`` with ``input_ids`` and ``logits``. Prints one JSON object:
folder name to the largest logit difference over the largest logit, the keys that loading complained
about, all warnings, and the probe texts that the tokenizer turns into other ids.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    return {"error": error, "keys": keys, "warnings": collect.messages, "ids": other_ids(folder)}


def other_ids(folder: Path) -> list[str]:
    """Texts that become other ids here, or other text when decoded; those expected stand in ``expected_ids.json``."""
    path = folder / "expected_ids.json"
    if not path.is_file():
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    for text, (ids, decoded) in json.loads(path.read_text()).items():
        now = tokenizer(text)["input_ids"]
        if now != ids or tokenizer.decode(now) != decoded:
            found.append(text)
    return found


print(json.dumps({"version": transformers.__version__} | {Path(f).name: check(Path(f)) for f in sys.argv[1:]}))
