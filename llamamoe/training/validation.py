"""Measure the loss of held-out blocks by domain while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..lazy import np, torch
from .batches import Layout, model_inputs
from .loss_head import LossHead

if TYPE_CHECKING:
    from ..data.shards import TokenCorpus


class Validation:
    """A fixed set of held-out blocks, spread evenly over the text of each domain.

    Args:
        corpus: Held-out tokens.
        block_length: Tokens per block; a domain with less text is not measured.
        blocks: Maximum number of blocks per domain; None takes all.
        separator: See `batches.model_inputs`.
        layout: Distribution among ranks; only its micro-batch size, world and rank are used.

    Raises:
        UsageError: No domain has a block.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        block_length: int,
        blocks: int | None,
        layout: Layout,
        *,
        separator: int | None = None,
    ) -> None:
        self.corpus, self.block_length, self.layout, self.separator = corpus, block_length, layout, separator
        self.domains = tuple(corpus.domains)
        picked = []
        for index, name in enumerate(self.domains):
            there = corpus.num_blocks(name, block_length)
            if there == 0:
                continue
            chosen = np.unique(np.linspace(0, there - 1, min(blocks or there, there)).astype(np.int64))
            picked.append(np.stack([np.full_like(chosen, index), chosen]))
        if not picked:
            raise UsageError(
                f"validation: no domain has a block of {block_length} tokens.",
                hint="Choose a smaller data.block_length, or tokenise more held-out text.",
            )
        self._domains, self._blocks = np.concatenate(picked, axis=1)

    @property
    def tokens(self) -> int:
        """Number of scored tokens: all of a block but the first."""
        return len(self._blocks) * (self.block_length - 1)

    def _micro_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Yield this rank's micro-batches, equally many on every rank for sharded models; surplus ones do not count."""
        size, world = self.layout.micro_batch_size, self.layout.world
        count = -(-len(self._blocks) // size)
        for turn in range(self.turns):
            index = turn * world + self.layout.rank
            rows = slice((index % count) * size, (index % count + 1) * size)
            yield self._domains[rows], self._blocks[rows], index < count

    @property
    def turns(self) -> int:
        """Number of micro-batches of one rank."""
        return math.ceil(math.ceil(len(self._blocks) / self.layout.micro_batch_size) / self.layout.world)

    def measure(self, model: Any, head: LossHead, advance: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Return losses in nats; gradients and the model's mode are up to the caller.

        Args:
            model: The model, wrapped or not.
            head: Its loss head.
            advance: Called after every micro-batch with the name of its first domain.

        Returns:
            ``loss`` (mean over the domains that have a block), ``perplexity`` (its exponential), ``domain_loss``.
        """
        from .loss_head import next_token_labels
        from .ranks import all_reduced

        device = next(model.parameters()).device
        sums = torch.zeros(2, len(self.domains), dtype=torch.float64)
        for domains, blocks, counts in self._micro_batches():
            ids_BT = self.corpus.gather(domains, blocks, self.block_length)
            inputs = {name: each.to(device) for name, each in model_inputs(ids_BT, self.separator).items()}
            losses = head(model, {**inputs, "use_cache": False}, next_token_labels(inputs["input_ids"]))
            if counts:
                index = torch.from_numpy(domains)
                sums[0].index_add_(0, index, losses.nll_BT.sum(1).double().cpu())
                sums[1].index_add_(0, index, losses.counted_BT.sum(1).double().cpu())
            advance(self.domains[domains[0]])
        totals, tokens = all_reduced(sums if device.type == "mps" else sums.to(device)).cpu()
        every = zip(self.domains, totals.tolist(), tokens.tolist(), strict=True)
        means = {name: total / count for name, total, count in every if count}
        loss = sum(means.values()) / len(means)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "domain_loss": means,
        }
