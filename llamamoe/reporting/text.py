"""Batch the text of a report: one domain at a time, windows of similar length together, padding never counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.perplexity import ScoringPlan
from ..evaluation.scores import Counts
from ..lazy import torch

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class TextBatch:
    """Windows that run together.

    Attributes:
        domain: Domain of all of them.
        windows: Their indices in the plan, ``[B]``.
        ids_BT: int64, padded on the right.
        real_BT: bool, False for padding.
        half_B: 0 or 1: the half of the domain to which a window belongs.
    """

    domain: str
    windows: np.ndarray
    ids_BT: torch.Tensor
    real_BT: torch.Tensor
    half_B: torch.Tensor


def batches(plan: ScoringPlan, batch_tokens: int = BATCH_TOKENS) -> Iterator[TextBatch]:
    """Yield all windows of a plan, domain by domain, the longest first, about ``batch_tokens`` tokens per batch."""
    lengths = np.array([window.stop - window.start for window in plan.windows])
    for domain, documents in plan.domains.items():
        half = _halves(plan, documents)
        mine = np.flatnonzero(np.isin(plan.owner, documents))
        mine = mine[np.argsort(-lengths[mine], kind="stable")]
        at = 0
        while at < len(mine):
            longest = int(lengths[mine[at]])
            part = mine[at : at + max(1, batch_tokens // longest)]
            at += len(part)
            real = torch.arange(longest) < torch.from_numpy(lengths[part])[:, None]
            ids = torch.zeros(real.shape, dtype=torch.long)  # the padding's id is never read
            ids[real] = torch.from_numpy(np.concatenate([_ids(plan, i) for i in part]))
            yield TextBatch(domain, part, ids, real, torch.tensor([half[int(i)] for i in part]))


def _ids(plan: ScoringPlan, index: int) -> np.ndarray:
    window = plan.windows[index]
    ids: np.ndarray = plan.encoded[window.document].ids[window.start : window.stop]
    return ids


def _halves(plan: ScoringPlan, documents: list[int]) -> dict[int, int]:
    """Put every other document, or every other window of a single document, into the second half."""
    mine = np.flatnonzero(np.isin(plan.owner, documents))
    if len(documents) > 1:
        number = {document: i for i, document in enumerate(documents)}
        return {int(i): number[int(plan.owner[i])] % 2 for i in mine}
    return {int(i): place % 2 for place, i in enumerate(mine)}


def counts(plan: ScoringPlan, nll: np.ndarray) -> dict[str, Counts]:
    """Return sums over documents by domain, from the negative log-likelihood of every window (float64, nats)."""
    total = np.bincount(plan.owner, weights=nll, minlength=len(plan.encoded))
    sums = (total, plan.tokens, plan.bytes)
    return {domain: Counts(*(each[members] for each in sums)) for domain, members in plan.domains.items()}


def words(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """Decode each token separately; tokens that are a part of a character give the replacement character."""
    return [tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]
