"""Calibration text sampled from the parent itself, which needs neither files nor a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.base import Checkpoint
from ..errors import CheckpointError, LlamaMoeError, UsageError
from ..lazy import torch
from ..models.streaming import StreamedModel
from ..progress import Progress, ProgressCallback, ignore_progress
from .reading import leading_bos
from .soundness import shape_facts
from .text import MIN_TOKENS, CalibrationText

SOURCE = "sampled from the parent"
DOMAIN = "sampled"
BATCH_SIZE = 32


def sample_text(
    model: DenseModel,
    tokenizer: Any,
    *,
    num_tokens: int,
    length: int,
    seed: int,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH_SIZE,
    progress: ProgressCallback = ignore_progress,
) -> CalibrationText:
    """Sample ``num_tokens // length`` sequences from the parent, each token from its own next-token distribution.

    Ancestral sampling from softmax(logits / temperature), neither top-k nor top-p: the text has the parent's own
    distribution, as far as it is given by the first token (LLM-QAT, arXiv:2305.17888, makes its data so, except
    that it takes the first few tokens greedily). A sequence starts with the beginning-of-sequence token; where the
    tokenizer has none, with the end-of-sequence token, after which documents begin in such models' training data; where
    it has neither, with a random token. Sampling continues after an end of sequence, with the token that the tokenizer
    puts before the next document, so that all sequences have the same length.

    Every sequence has its own random numbers: batch size and device change results by rounding only, and on the
    CPU the text is the same for the same seed, batch size, versions and number of threads.

    Cost: the whole parent is in memory for this step only (the rest of a conversion holds one layer), and
    for ``batch_size`` sequences the keys and values of ``length`` tokens; ``length`` steps for each batch.

    Args:
        model: The parent.
        tokenizer: Its tokenizer; only the ids of its special tokens are used.
        num_tokens: Maximum number of tokens to sample, at least `MIN_TOKENS`.
        length: Tokens per sequence, the first one included; at most the parent's number of positions.
        seed: Seed of the random numbers.
        temperature: Above 0; 1 is the parent's own distribution.
        dtype: Dtype of the computation; None for float32.
        device: Device of the computation.
        batch_size: Sequences that are sampled together.
        progress: Called after every token of a batch with the number of tokens.

    Raises:
        UsageError: A number is out of range.
        CheckpointError: Transformers cannot load the parent, or a special token is not in its vocabulary.
        LlamaMoeError: The parent's logits are not finite.
    """
    _check(num_tokens, length, temperature, batch_size, model.spec.max_position_embeddings)
    length = min(length, num_tokens)
    first, after_end = _special(tokenizer, model.spec.vocab_size)
    uniform_ST = np.random.default_rng([seed, *b"sampled text"]).random((num_tokens // length, length))
    ids_ST = np.empty(uniform_ST.shape, np.int64)
    ids_ST[:, 0] = (uniform_ST[:, 0] * model.spec.vocab_size).astype(np.int64) if first is None else first
    parent = _load(model, dtype, device)
    for start in range(0, len(ids_ST), batch_size):
        part = slice(start, start + batch_size)
        for at in _continue(parent, ids_ST[part], uniform_ST[part], temperature, after_end):
            done = start * length + len(ids_ST[part]) * (at + 1)
            progress(Progress("sample text", done, ids_ST.size, "token"))
    facts = {"source": SOURCE, **shape_facts(ids_ST), "seed": seed, "temperature": temperature, "first_token": first}
    facts["dtype"] = str(parent.dtype).removeprefix("torch.")
    return CalibrationText(ids_ST, (DOMAIN,) * len(ids_ST), clusters_S=None, facts=facts, warnings=())


def _load(model: DenseModel, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """Load the whole parent in ``dtype``, casting each tensor as it is read so that only one copy is held."""

    def read(name: str) -> torch.Tensor:
        tensor = model.checkpoint.read(name)
        return tensor if dtype is None else tensor.to(dtype)

    return StreamedModel.of_dense(model, read, dtype=dtype, device=device).whole()


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """Open the tokenizer of a folder or GGUF file, without remote code and without the network.

    Raises:
        CheckpointError: The tokenizer is missing, or transformers cannot load it.
    """
    from ..models.loading import gguf_tokenizer, open_model

    if checkpoint.path.is_dir():
        return open_model(checkpoint.path).tokenizer
    return gguf_tokenizer(checkpoint)


def _check(num_tokens: int, length: int, temperature: float, batch_size: int, positions: int) -> None:
    if num_tokens < MIN_TOKENS:
        raise UsageError(f"num_tokens is {num_tokens}, but calibration needs at least {MIN_TOKENS} tokens.")
    if not 2 <= length <= positions:
        raise UsageError(f"The length of sampled sequences is {length}, but must be from 2 to {positions} (positions).")
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"The temperature is {temperature}, but must be a number above 0.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1.")


def _special(tokenizer: Any, vocab_size: int) -> tuple[int | None, dict[int, int]]:
    """Return the first token of sequences, and the token after an end of sequence (empty: sampled as usual)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = bos if bos is not None else eos
    leading = leading_bos(tokenizer)
    after_end = {eos: leading} if leading is not None and eos is not None and leading != eos else {}
    for token in (bos, eos):
        if token is not None and token >= vocab_size:
            raise CheckpointError(
                f"The tokenizer's special token {token} is not among the model's {vocab_size} tokens.",
                hint="The tokenizer belongs to another model; pass the model's own.",
            )
    return first, after_end


def _continue(
    parent: Any, ids_BT: np.ndarray, uniform_BT: np.ndarray, temperature: float, after_end: dict[int, int]
) -> Iterator[int]:
    """Fill ``ids_BT`` from its first column on, yielding the index of each column that is filled."""
    cache = None
    with torch.inference_mode():
        for at in range(1, ids_BT.shape[1]):
            last = torch.from_numpy(ids_BT[:, at - 1 : at]).to(parent.device)
            output = parent(input_ids=last, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids_BT[:, at] = _draw(output.logits[:, -1].float() / temperature, uniform_BT[:, at])
            for end, start in after_end.items():
                ids_BT[ids_BT[:, at - 1] == end, at] = start
            yield at


def _draw(logits_BV: torch.Tensor, uniform_B: np.ndarray) -> np.ndarray:
    """Sample one token of softmax(logits) per row, where the cumulative distribution passes ``uniform``: ``[B]``."""
    if logits_BV.device.type == "mps":  # MPS lacks float64
        logits_BV = logits_BV.cpu()
    total_BV = torch.softmax(logits_BV, -1, dtype=torch.float64).cumsum(-1)
    if not bool(torch.isfinite(total_BV[:, -1]).all()):
        raise LlamaMoeError("The parent's logits are not finite, so no text can be sampled from it.")
    # Scaled by the last entry, which rounding can leave different from 1, so that no draw exceeds the last token.
    target_B1 = torch.from_numpy(uniform_B[:, None]).to(total_BV.device) * total_BV[:, -1:]
    found: np.ndarray = (
        torch.searchsorted(total_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1).cpu().numpy()
    )
    return found
