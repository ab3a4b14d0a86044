"""Run by an interpreter with optimum-intel: convert checkpoints to OpenVINO, compare with what transformers computed.

    python run_openvino.py FOLDER...

See `exchange.py` for what is read and printed.
"""

from pathlib import Path

import torch
from exchange import Expected, report
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def check(folder: Path) -> dict:
    """Convert, compute all logits at once, generate greedily."""
    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = Expected(folder)
    logits = [_logits(model, ids) for ids in expected.sequences]
    greedy = []
    for text in expected.texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        steps = len(expected.greedy[0])
        found = model.generate(ids, do_sample=False, max_new_tokens=steps, min_new_tokens=steps)
        greedy.append(found[0, ids.shape[1] :].tolist())
    return expected.compare(logits, greedy)


def _logits(model: OVModelForCausalLM, ids: list[int]) -> object:
    """``[T, V]`` of one sequence."""
    batch = torch.tensor([ids])
    return model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0].float().numpy()


report(["openvino", "optimum-intel"], check)
