"""Compute token losses instead of logits, cross entropy and the distance to a parent, in constant memory.

The logits of T tokens over V words are the largest tensor of a training step. Here they are never complete in memory:
while `LossHead` runs a model, the model's own output head computes a few tokens' logits at a time, turns them into one
number per token and loss, and computes them again in the backward pass. All of it happens inside the model's forward
pass, so DDP, FSDP2 (whose full weights exist only there), autocast and peft get one ordinary call of the head, and no
weight changes its name.

Shapes: T tokens, V vocabulary, H hidden size, C tokens of a chunk, m of the parent's most probable tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..lazy import torch
from .model_parts import find_causal_lm
from .routing import at_least_float32

if TYPE_CHECKING:
    MakeLogits = Callable[[torch.Tensor], torch.Tensor]

IGNORED = -100
"""The label of an ignored token."""
LOGITS_AT_ONCE = 1 << 26
"""Logits of a chunk: 256 MiB in float32; a few tensors of this size exist at once, whatever T and V."""


@dataclass(frozen=True)
class KlTarget:
    """A parent's predictions, and the measure of the distance to them.

    The distance of a token is ``temperature^2 KL(parent || student)`` of both distributions at that temperature
    (Hinton et al. 2015, arXiv:1503.02531: the factor keeps the size of gradients). With ``top_m`` the parent's m most
    probable tokens count one by one and all others as one token that has their summed probability: a lower bound of
    the full KL (log-sum inequality) that is zero where the full one is.

    Attributes:
        hidden_TH: Inputs of the parent's head, any leading shape; no gradient.
        logits: The parent's head: hidden states to logits ``[..., V]``.
        temperature: Above 0.
        top_m: m, or None for all of the vocabulary.
        counted_T: bool, which tokens count, any leading shape; None: all that have a label.
    """

    hidden_TH: torch.Tensor
    logits: MakeLogits
    temperature: float = 1.0
    top_m: int | None = None
    counted_T: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenLosses:
    """The losses of a micro-batch. Both sums are linear in the tokens: equal for any split of a global batch.

    Attributes:
        nll_sum: Scalar with gradient: cross entropy in nats, summed over the tokens that count.
        kl_sum: Scalar with gradient: the distance to the parent, summed likewise; None without a parent.
        nll_BT: float32 (float64 if the logits are), no gradient: cross entropy of each token, 0 where it does not
            count; shaped like the labels.
        kl_BT: The same of the distance.
        counted_BT: bool: which tokens count.
    """

    nll_sum: torch.Tensor
    kl_sum: torch.Tensor | None
    nll_BT: torch.Tensor
    kl_BT: torch.Tensor | None
    counted_BT: torch.Tensor


def next_token_labels(labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the label of each position: transformers' labels shifted left by one; the last is ignored."""
    return torch.nn.functional.pad(labels_BT[..., 1:], (0, 1), value=IGNORED)


def token_losses(
    make_logits: MakeLogits,
    hidden_TH: torch.Tensor,
    labels_T: torch.Tensor,
    target: KlTarget | None = None,
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
    vocab_size: int,
) -> torch.Tensor:
    """Return cross entropy and distance of each token, with gradient.

    Computed in float32 (float64 if the logits are) whatever the dtype of the logits. Tokens go through the head in
    chunks; unless one chunk holds all, each is computed again in the backward pass: 1.4 times the head's time.

    Args:
        make_logits: The student's head: ``[C, H]`` to ``[C, V]``; a module or function, called once per chunk.
        hidden_TH: Inputs of the head.
        labels_T: int64, the token to predict, `IGNORED` for ignored tokens.
        target: The parent's predictions for the same tokens.
        logits_at_once: C x V is at most this (but C at least 1).
        vocab_size: V.

    Returns:
        ``[T, 1]``, or ``[T, 2]`` with a target: nats, 0 where the label is ignored.

    Raises:
        ValueError: Target and hidden states have different numbers of tokens.
    """
    rows = max(1, logits_at_once // vocab_size)
    hidden, labels = torch.split(hidden_TH, rows), torch.split(labels_T, rows)
    parents = _parent_chunks(target, labels_T, rows)
    chunks = [(make_logits, target, *chunk) for chunk in zip(hidden, labels, parents, strict=True)]
    if len(chunks) == 1:
        return _chunk_losses(*chunks[0])
    out: torch.Tensor = torch.cat(
        [torch.utils.checkpoint.checkpoint(_chunk_losses, *chunk, use_reentrant=False) for chunk in chunks]
    )
    return out


def _parent_chunks(
    target: KlTarget | None, labels_T: torch.Tensor, rows: int
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the parent's hidden states and which of them count, split as the student's are; Nones without a parent."""
    tokens = len(labels_T)
    if target is None:
        return [None] * max(1, -(-tokens // rows))
    parent_TH = target.hidden_TH.detach().flatten(0, -2)
    if len(parent_TH) != tokens:
        raise ValueError(f"{len(parent_TH)} tokens of the parent for {tokens}")
    counted_T = labels_T != IGNORED
    if target.counted_T is not None:
        counted_T = counted_T & target.counted_T.flatten().to(labels_T.device)
    return list(zip(torch.split(parent_TH, rows), torch.split(counted_T, rows), strict=True))


def _chunk_losses(
    make_logits: MakeLogits,
    target: KlTarget | None,
    hidden_CH: torch.Tensor,
    labels_C: torch.Tensor,
    parent: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """See `token_losses`; ``[C, 1]`` or ``[C, 2]``."""
    logits_CV = at_least_float32(make_logits(hidden_CH))
    log_q_CV = logits_CV.log_softmax(-1)
    picked_C = log_q_CV.gather(-1, labels_C.clamp(min=0)[:, None])[:, 0]
    losses = [torch.where(labels_C != IGNORED, -picked_C, 0.0)]
    if target is not None and parent is not None:
        parent_CH, counted_C = parent
        with torch.no_grad():
            parent_CV = at_least_float32(target.logits(parent_CH)).to(logits_CV.device)
            parent_CV = parent_CV.to(logits_CV.dtype) / target.temperature
        if target.temperature != 1.0:
            log_q_CV = (logits_CV / target.temperature).log_softmax(-1)
        kl_C = _divergence(parent_CV, log_q_CV, target.top_m) * target.temperature**2
        losses.append(torch.where(counted_C, kl_C, 0.0))
    return torch.stack(losses, -1)


def _divergence(parent_CV: torch.Tensor, log_q_CV: torch.Tensor, top_m: int | None) -> torch.Tensor:
    """Return ``KL(softmax(parent) || q)`` of each row, over all words or the m likeliest and the rest as one."""
    log_p_CV = parent_CV.log_softmax(-1)
    if top_m is not None and top_m < log_p_CV.shape[-1]:
        index_Cm = log_p_CV.topk(top_m, dim=-1, sorted=False).indices
        log_p_CV, log_q_CV = (_with_rest(each, index_Cm) for each in (log_p_CV, log_q_CV))
    each_CV = torch.nn.functional.kl_div(log_q_CV, log_p_CV, reduction="none", log_target=True)
    return each_CV.sum(-1)


def _with_rest(log_p_CV: torch.Tensor, index_Cm: torch.Tensor) -> torch.Tensor:
    """Return ``[C, m + 1]``: log-probabilities of these words and, last, of all others together.

    The rest is summed directly, not subtracted from 1: if the m words have nearly all of it, the difference is
    rounding.
    """
    rest_C1 = log_p_CV.scatter(-1, index_Cm, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_CV.gather(-1, index_Cm), rest_C1], -1)


class LossHead:
    """A wrapper of the forward pass that returns token losses instead of logits.

    Args:
        model: A causal language model of transformers; inside peft, DDP or FSDP2, or not.
        logits_at_once: See `token_losses`.

    Raises:
        CheckpointError: The model has no output head, or computes its logits in an unsupported way.
    """

    def __init__(self, model: torch.nn.Module, *, logits_at_once: int = LOGITS_AT_ONCE) -> None:
        base = find_causal_lm(model)
        self._head: torch.nn.Module = base.get_output_embeddings()
        config = base.config.get_text_config()
        if getattr(config, "final_logit_softcapping", None):
            raise CheckpointError(f"{type(base).__name__} bends its logits in a way that is not known here.")
        factor = float(getattr(config, "logit_scale", None) or 1.0)
        self._divisor = float(getattr(config, "logits_scaling", None) or 1.0 / factor)
        self._vocab_size = int(config.vocab_size)
        self._logits_at_once = logits_at_once
        self._checked = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the model's logits of these hidden states: head and scale. For unsharded models."""
        out: torch.Tensor = self._head(hidden)
        return out / self._divisor if self._divisor != 1.0 else out

    def __call__(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        labels_BT: torch.Tensor,
        target: KlTarget | None = None,
    ) -> TokenLosses:
        """Run one forward pass of the model, up to its losses.

        Args:
            model: The model given at construction, or its wrapper (DDP, FSDP2).
            inputs: Its arguments (``input_ids`` and more, no ``labels``).
            labels_BT: int64, the label of each position (see `next_token_labels`).
            target: The parent's predictions for the same tokens.

        Raises:
            CheckpointError: The model processes its logits in an unsupported way.
        """
        with self._armed(labels_BT, target) as kept:
            out_BTL = model(**inputs).logits
        values_TL = kept[0].detach()
        if not self._checked:
            self._check(out_BTL)
        grads = out_BTL[..., :-1].flatten(0, -2).sum(0, dtype=values_TL.dtype)
        # An FSDP2 policy can round the model's result: values come from the head itself, the gradient from the result.
        sums = grads if out_BTL.dtype == values_TL.dtype else values_TL.sum(0) + (grads - grads.detach())
        each = values_TL.view(*labels_BT.shape, -1)
        has_kl = target is not None
        return TokenLosses(
            nll_sum=sums[0],
            kl_sum=sums[1] if has_kl else None,
            nll_BT=each[..., 0],
            kl_BT=each[..., 1] if has_kl else None,
            counted_BT=labels_BT != IGNORED,
        )

    @contextmanager
    def _armed(self, labels_BT: torch.Tensor, target: KlTarget | None) -> Iterator[list[torch.Tensor]]:
        """Let the head module return losses and a witness while active; the losses as computed are kept too."""
        head = self._head
        own = head.__dict__.get("forward")  # set by accelerate's hooks
        original = head.forward
        kept: list[torch.Tensor] = []

        def make_logits(hidden_CH: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = original(hidden_CH)
            return logits / self._divisor if self._divisor != 1.0 else logits

        def forward(hidden_BTH: torch.Tensor) -> torch.Tensor:
            losses_TL = token_losses(
                make_logits,
                hidden_BTH.flatten(0, -2),
                labels_BT.reshape(-1).to(hidden_BTH.device),
                target,
                logits_at_once=self._logits_at_once,
                vocab_size=self._vocab_size,
            )
            kept.append(losses_TL)
            witness_T1 = torch.ones_like(losses_TL[:, :1])
            out = torch.cat([losses_TL, witness_T1], -1).view(*hidden_BTH.shape[:-1], -1)
            return out * self._divisor if self._divisor != 1.0 else out  # the model divides it again

        head.forward = forward
        try:
            yield kept
        finally:
            del head.forward
            if own is not None:
                head.forward = own

    def _check(self, out_BTL: torch.Tensor) -> None:
        """Check that the witness passed through the model unchanged, and so the losses."""
        if not bool((out_BTL[..., -1] == 1).all()):
            raise CheckpointError("The model changes its logits after its head in a way that is not known here.")
        self._checked = True
