"""Score windows of tokens with one model.

Shapes: B windows, T tokens of the longest, P scored tokens of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..data.encoding import Encoded, Window
from ..errors import CheckpointError, LlamaMoeError
from ..lazy import torch
from ..models.loading import LOGITS_AT_ONCE


def score_windows(
    models: Sequence[Any],
    documents: Sequence[Encoded],
    windows: Sequence[Window],
    batch_size: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Sum the negative log-likelihood of each window's scored tokens.

    Windows of similar length share a batch, the longest first, so that a batch that does not fit in memory
    fails at once. ``advance`` is called after every batch with the number of tokens it scored. Several models are
    copies of one on several devices: each takes the next batch when it is free; on equal devices the result is the
    same.

    Returns:
        float64 [len(windows)], in nats.

    Raises:
        CheckpointError: The tokenizer produces ids that the model lacks.
        LlamaMoeError: A loss is not finite.
    """
    check_ids(models[0].name_or_path, models[0].get_input_embeddings().weight.shape[0], documents)
    order = sorted(range(len(windows)), key=lambda i: windows[i].start - windows[i].stop)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    free: queue.SimpleQueue[_Scorer] = queue.SimpleQueue()
    for model in models:
        free.put(_Scorer(model, documents, windows))

    def score(batch: list[int]) -> np.ndarray:
        scorer = free.get()
        try:
            return scorer.score(batch)
        finally:
            free.put(scorer)

    out = np.zeros(len(windows))
    with _running(score, batches, len(models)) as results:
        for batch, nll_B in zip(batches, results, strict=True):
            out[batch] = nll_B
            advance(sum(windows[i].scored for i in batch))
    return out


@contextlib.contextmanager
def _running(
    score: Callable[[list[int]], np.ndarray], batches: Sequence[list[int]], workers: int
) -> Iterator[Iterator[np.ndarray]]:
    """Yield results in order; one worker needs no thread, several stop at the first error."""
    if workers == 1:
        yield map(score, batches)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool.map(score, batches)
    finally:
        pool.shutdown(cancel_futures=True)


def check_ids(name: str, rows: int, documents: Sequence[Encoded]) -> None:
    """Check that every id has an embedding.

    Args:
        name: Name of the model.
        rows: Number of its embeddings.
        documents: Documents, at least one with tokens.

    Raises:
        CheckpointError: An id has none.
    """
    largest = max(int(document.ids.max()) for document in documents if len(document.ids))
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer of '{name}' produces the id {largest}, but the model has only {rows} embeddings.",
            hint="The folder's tokenizer belongs to another model; copy the model's own.",
        )


class _Scorer:
    """One copy of the model, with its head."""

    def __init__(self, model: Any, documents: Sequence[Encoded], windows: Sequence[Window]) -> None:
        self.model, self.documents, self.windows = model, documents, windows
        self._head: list[Head | None] = []

    def score(self, batch: Sequence[int]) -> np.ndarray:
        """Return the negative log-likelihood of each window of the batch, float64 [B]."""
        chosen = [self.windows[i] for i in batch]
        tokens = [self.documents[w.document].ids[w.start : w.stop] for w in chosen]
        with torch.inference_mode():
            if not self._head:
                ids_1T = torch.from_numpy(tokens[0][None, :16]).to(self.model.device)
                self._head.append(_find_head(self.model, ids_1T))
            nll_B = _score_batch(self.model, self._head[0], tokens, [w.begin - w.start for w in chosen])
        for window, nll in zip(chosen, nll_B, strict=True):
            if not np.isfinite(nll):
                raise LlamaMoeError(
                    f"The loss on {self.documents[window.document].document.origin} is not finite ({nll}).",
                    hint="Try dtype float32; if that does not help, the weights are broken.",
                )
        return nll_B


Head = Callable[["torch.Tensor"], "torch.Tensor"]


def _find_head(model: Any, ids_1T: torch.Tensor) -> Head | None:
    """Find the function from hidden states to logits, so that long sequences can be scored piece by piece.

    Most models only apply their output embedding, some scale its result. The choice is checked
    against the model's own logits; None means that neither matches, and the whole forward pass must be used.
    """
    output = model.get_output_embeddings()
    if output is None or model.base_model is model:
        return None
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    candidates: list[Head] = [lambda h: output(h).float()]
    if factor:
        candidates.append(lambda h: (output(h) * factor).float())
    if divisor:
        candidates.append(lambda h: (output(h) / divisor).float())
    logits = model(ids_1T, use_cache=False).logits.float()
    hidden = model.base_model(ids_1T, use_cache=False).last_hidden_state
    # A model spread over devices returns its logits to the first one.
    agreeing = (
        head for head in candidates if torch.allclose(head(hidden).to(logits.device), logits, rtol=1e-4, atol=1e-6)
    )
    return next(agreeing, None)


def _score_batch(model: Any, head: Head | None, tokens: Sequence[np.ndarray], begins: Sequence[int]) -> np.ndarray:
    """Return the negative log-likelihood of each window's tokens from ``begins`` on, float64 [B], in nats."""
    lengths = torch.tensor([len(ids) for ids in tokens])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)  # the padding's id is never read: see `scored`
    ids[mask] = torch.from_numpy(np.concatenate(tokens))
    scored = mask[:, 1:] & (torch.arange(1, mask.shape[1]) >= torch.tensor(begins)[:, None])
    targets = ids[:, 1:][scored]
    owner = scored.nonzero()[:, 0]
    # Tokens do not attend to later ones, so padding on the right needs no mask; without one the fast
    # causal kernels run, and a window gives the same result in any batch.
    if head is None:
        rows = [model(row[None].to(model.device), use_cache=False).logits[0, :-1] for row in ids]
        pieces: Iterator[torch.Tensor] = (r[s.to(r.device)].float() for r, s in zip(rows, scored, strict=True))
        nll_P = _nll(pieces, targets)
    else:
        hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state[:, :-1]
        hidden_PH = hidden[scored.to(hidden.device)]
        step = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
        nll_P = _nll((head(piece) for piece in hidden_PH.split(step)), targets)
    return torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, owner, nll_P).numpy()


def _nll(pieces: Iterator[torch.Tensor], targets_P: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of fp32 logits given in pieces along P, float64 [P] on the CPU."""
    out, at = [], 0
    for logits in pieces:
        targets = targets_P[at : at + len(logits)].to(logits.device)
        out.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu().double())
        at += len(logits)
    return torch.cat(out)
