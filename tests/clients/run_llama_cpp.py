"""Run by an interpreter with llama.cpp: load GGUF files, quantise them, compare with what transformers computed.

    python run_llama_cpp.py FOLDER...

Each folder holds ``model.gguf`` in float32. See `exchange.py` for what is read and printed; the server returns
log-probabilities in the place of logits, and the error is theirs. ``quantised`` has for each type the perplexity of the
sequences, the mean divergence from transformers' predictions, and in how many matrices each type is stored. llama.cpp runs by xllamacpp, which has no quantiser; that of
ik_llama.cpp, a fork, writes the same formats.
"""

import json
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import xllamacpp
from exchange import Expected, log_softmax, report
from gguf import GGUFReader

ANY = 70  # a letter in every tokenizer of the tests


class Loaded:
    """A file in llama.cpp's server, with keys and values in float32, and no flash attention, which rounds to float16."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 128, 1, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def next(self, prompt: str | list[int], vocabulary: int) -> np.ndarray:
        """``[V]`` log-probabilities behind a prompt, of which a prefix seen before is cached.

        They are those before sampling. The token is forced to be ``ANY``, because the server drops the probabilities of
        one that is not whole in UTF-8.
        """
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "n_probs": vocabulary, "logit_bias": [[ANY, 1e9]], "temperature": 0.0}
        )
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        row = np.full(vocabulary, np.nan)
        for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[top["id"]] = top["logprob"]
        return row


def sequence(loaded: Loaded, ids: list[int], vocabulary: int) -> np.ndarray:
    """``[T, V]`` log-probabilities behind each token of a sequence."""
    return np.stack([loaded.next(ids[: place + 1], vocabulary) for place in range(len(ids))])


def quality(logs: list[np.ndarray], expected: Expected) -> dict:
    """Perplexity of the sequences, and the Kullback-Leibler divergence from what transformers predicts, mean over tokens."""
    losses, divergences = [], []
    for rows, logits, ids in zip(logs, expected.logits, expected.sequences, strict=True):
        right = log_softmax(logits)
        losses.append(-rows[np.arange(len(ids) - 1), ids[1:]])
        divergences.append((np.exp(right) * (right - rows)).sum(-1))
    return {
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
        "divergence": float(np.concatenate(divergences).mean()),
    }


def quantise(source: Path, kind: str) -> Path:
    """Run ``llama-quantize SOURCE OUT KIND``."""
    spec = find_spec("ik_llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    out = source.with_name(f"{kind}.gguf")
    command = [Path(spec.origin).parent / "bin" / "llama-quantize", source, out, kind, "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def check(folder: Path) -> dict:
    """Compute the file as exported, by ids and (the first greedy token) by text, and the loss after quantising."""
    path, expected = folder / "model.gguf", Expected(folder)
    vocabulary = expected.logits[0].shape[1]
    loaded = Loaded(path)
    logs = [sequence(loaded, ids, vocabulary) for ids in expected.sequences]
    greedy = [
        [int(loaded.next(text, vocabulary).argmax()), *map(int, rows[len(prompt) : -1].argmax(-1))]
        for text, prompt, rows in zip(expected.texts, expected.prompts, logs, strict=True)
    ]
    quantised = {
        "transformers": quality([log_softmax(rows) for rows in expected.logits], expected),
        "F32": quality(logs, expected),
    }
    for kind in ("Q8_0", "Q4_K_M"):
        smaller = quantise(path, kind)
        weak = Loaded(smaller)
        found = [sequence(weak, ids, vocabulary) for ids in expected.sequences]
        kinds = Counter(each.tensor_type.name for each in GGUFReader(smaller).tensors if len(each.shape) > 1)
        quantised[kind] = quality(found, expected) | {"kinds": dict(kinds)}
    return expected.compare_logs(logs, greedy) | {"quantised": quantised}


report(["xllamacpp"], check)
