"""Split global batches of token blocks into micro-batches and distribute them among ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..lazy import np, torch
from .recipe import PretrainRecipe

if TYPE_CHECKING:
    from ..data.shards import TokenCorpus
    from .mixtures.sampler import MixtureSampler


@dataclass(frozen=True)
class Layout:
    """The distribution of a global batch among ranks.

    Micro-batch m holds sequences from m x micro_batch_size on and is run by rank m mod world, so that the set of
    micro-batches of a step is the same for any number of ranks.

    Attributes:
        batch_size: Sequences of a step.
        micro_batch_size: Sequences of a micro-batch.
        world: Ranks with different data.
        rank: This rank among them.
    """

    batch_size: int
    micro_batch_size: int
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batch_size * self.world):
            raise UsageError(
                f"batch_size = {self.batch_size} cannot be dealt to {self.world} ranks in micro-batches of "
                f"{self.micro_batch_size}.",
                hint=f"Make it a multiple of {self.micro_batch_size * self.world}, or choose a smaller micro_batch_size.",
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.batch_size // self.micro_batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.micro_batches // self.world

    def index(self, turn: int) -> int:
        """Return the micro-batch that this rank runs at its ``turn``-th turn of a step."""
        return turn * self.world + self.rank

    def rows(self, micro_batch: int) -> slice:
        """Return the sequences of a micro-batch within the global batch."""
        return slice(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size)


def check_ranks(recipe: PretrainRecipe, world_size: int) -> None:
    """Refuse a number of processes that does not suit the recipe's sharding or batch.

    Raises:
        UsageError: They do not fit; the message names what would.
    """
    sizes = recipe.distributed
    if sizes.sharded and sizes.world_size != world_size:
        raise UsageError(
            f"distributed.fsdp_size = {sizes.fsdp_size} times dp_replicate_size = {sizes.dp_replicate_size} must be the number of "
            f"processes, which is {world_size}.",
            hint=f"Start {sizes.world_size} processes, or set distributed.fsdp_size={world_size}.",
        )
    Layout(recipe.batch_size, recipe.micro_batch_size, world_size)


def model_inputs(ids_BT: np.ndarray, separator: int | None = None) -> dict[str, torch.Tensor]:
    """Return a model's inputs of these tokens: ``input_ids``, and ``position_ids`` if documents are kept apart.

    Transformers' models take positions that begin again for the start of another sequence, to which and from which
    nothing attends.

    Args:
        ids_BT: int64 tokens.
        separator: The token that ends a document; None: documents are joined.
    """
    found = {"input_ids": torch.from_numpy(ids_BT)}
    if separator is not None:
        places_T = np.arange(ids_BT.shape[1])
        begins_BT = np.zeros(ids_BT.shape, dtype=np.int64)
        begins_BT[:, 1:] = np.where(ids_BT[:, :-1] == separator, places_T[1:], 0)
        found["position_ids"] = torch.from_numpy(places_T - np.maximum.accumulate(begins_BT, axis=1))
    return found


class TokenBatches:
    """The data loader of the Trainer: this rank's micro-batches from a step on.

    Reading is a gather from memory-mapped files, by a thread that reads the next step's micro-batches while the model
    runs: no loader processes are needed. Where the mixture may change between two steps, the second one is drawn after
    the change.

    Args:
        corpus: The tokens.
        sampler: The sampler of each global batch's blocks.
        layout: Distribution among ranks.
        block_length: Tokens of a block.
        max_steps: The last step.
        separator: See `model_inputs`.
        changes_every: Steps between possible changes of the mixture; None: it does not change.
        pin_for: A CUDA device, for which batches are read into pinned memory; None: ordinary memory.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        sampler: MixtureSampler,
        layout: Layout,
        block_length: int,
        max_steps: int,
        *,
        separator: int | None = None,
        changes_every: int | None = None,
        pin_for: torch.device | None = None,
    ) -> None:
        self.corpus, self.sampler, self.layout = corpus, sampler, layout
        self.block_length, self.max_steps = block_length, max_steps
        self.separator = separator
        self._changes_every, self._pin_for = changes_every, pin_for
        self.first_step = 0
        self.dataset = range(max_steps * layout.batch_size)
        """Only its length is used: sequences of the run."""

    def __len__(self) -> int:
        return self.max_steps * self.layout.accumulation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader = ThreadPoolExecutor(1, "llamamoe-batches", initializer=self._enter_thread)
        try:
            ahead: list[Future[dict[str, Any]]] = []
            for step in range(self.first_step, self.max_steps):
                reading, ahead = ahead or self._read(reader, step), []
                last = len(reading) - 1
                for turn, micro_batch in enumerate(reading):
                    found = micro_batch.result()
                    if turn == last and self._is_drawable(step + 1):
                        ahead = self._read(reader, step + 1)
                    yield found
        finally:
            reader.shutdown(cancel_futures=True)

    def _is_drawable(self, step: int) -> bool:
        """Return whether the mixture of this step is known before the step before it is over."""
        return step < self.max_steps and (self._changes_every is None or step % self._changes_every > 0)

    def _read(self, reader: Executor, step: int) -> list[Future[dict[str, Any]]]:
        """Draw a step, in the caller's thread, and let its micro-batches be read in another."""
        domains, blocks = self.sampler.batch(step)
        found = []
        for turn in range(self.layout.accumulation):
            index = self.layout.index(turn)
            rows = self.layout.rows(index)
            found.append(reader.submit(self._micro_batch, step, index, domains[rows], blocks[rows]))
        return found

    def _enter_thread(self) -> None:
        if self._pin_for is not None:  # a thread begins on the first device, where pinning would make a context
            torch.cuda.set_device(self._pin_for)

    def _micro_batch(self, step: int, index: int, domains: np.ndarray, blocks: np.ndarray) -> dict[str, Any]:
        ids_BT = self.corpus.gather(domains, blocks, self.block_length)
        tensors = {
            **model_inputs(ids_BT, self.separator),
            "domains": torch.from_numpy(domains),
            "blocks": torch.from_numpy(blocks),
        }
        if self._pin_for is not None:
            tensors = {name: each.pin_memory() for name, each in tensors.items()}
        return {**tensors, "place": (step, index)}

    def describe(self, place: tuple[int, int]) -> str:
        """Describe the text of a micro-batch for messages: ``arxiv blocks 4 and 17``.

        Args:
            place: Step and micro-batch.
        """
        step, index = place
        domains, blocks = self.sampler.batch(step)
        rows, names = self.layout.rows(index), self.corpus.domains
        held: dict[str, list[int]] = {}
        for domain, block in zip(domains[rows].tolist(), blocks[rows].tolist(), strict=True):
            held.setdefault(names[domain], []).append(block)
        return "; ".join(f"{name}: block {', '.join(map(str, numbers))}" for name, numbers in sorted(held.items()))
