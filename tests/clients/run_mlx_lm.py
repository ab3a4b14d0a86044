"""Run by an interpreter with mlx-lm: load checkpoints as its users do, compare with what transformers computed.

    python run_mlx_lm.py FOLDER...

See `exchange.py` for what is read and printed.
"""

from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from exchange import Expected, report


def check(folder: Path) -> dict:
    """Load, compute all logits at once, generate greedily."""
    model, tokenizer = mlx_lm.load(str(folder))
    expected = Expected(folder)
    logits = [np.array(model(mx.array(ids)[None])[0].astype(mx.float32)) for ids in expected.sequences]
    steps = len(expected.greedy[0])
    greedy = [
        [each.token for each in mlx_lm.stream_generate(model, tokenizer, prompt=ids, max_tokens=steps)]
        for ids in expected.prompts
    ]
    return expected.compare(logits, greedy)


report(["mlx-lm"], check)
