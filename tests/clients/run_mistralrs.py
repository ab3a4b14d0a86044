"""Run by an interpreter with mistral.rs: load checkpoints, compare texts and log-probabilities with transformers'.

    python run_mistralrs.py FOLDER...

See `exchange.py` for what is read and printed. Its Python interface returns no logits: the error is that of the
log-probabilities of the most likely tokens, over the largest logit.
"""

from pathlib import Path

import numpy as np
from exchange import Expected, report
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which


def check(folder: Path) -> dict:
    """Load, generate greedily from the prompts' texts."""
    expected = Expected(folder)
    runner = Runner(Which.Plain(model_id=str(folder), dtype=ModelDType.F32), no_paged_attn=True, prefix_cache_n=0)
    greedy, logs = [], []
    for text, prompt, rows in zip(expected.texts, expected.prompts, expected.logits, strict=True):
        request = ChatCompletionRequest(
            text, "default", logprobs=True, top_logprobs=5, max_tokens=len(expected.greedy[0]), temperature=0.0
        )
        content = runner.send_chat_completion_request(request).choices[0].logprobs.content
        found = np.full(rows.shape, np.nan)
        for place, step in enumerate(content, start=len(prompt) - 1):
            for top in step.top_logprobs:
                found[place, top.token] = top.logprob
        greedy.append([max(step.top_logprobs, key=lambda top: top.logprob).token for step in content])
        logs.append(found)
    return expected.compare_logs(logs, greedy)


report(["mistralrs"], check)
