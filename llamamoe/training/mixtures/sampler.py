"""Choose the domain and block of every sequence of every global batch, deterministically and exactly after any stop.

The whole state is the step and a log of weight changes. Global batches do not depend on the number of processes,
on how they share a batch, or on how far ahead batches are drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import RefusedError, UsageError, near_misses
from .permutation import Permutation, permute

_STEPS_AT_ONCE = 1 << 16
_KEPT = 64  # permutations


class Batch(NamedTuple):
    """The sequences of a global batch, in order.

    Attributes:
        domain_B: int64, index of each domain in `MixtureSampler.names`.
        block_B: int64, index of the block in that domain.
    """

    domain_B: np.ndarray
    block_B: np.ndarray


class MixtureSampler:
    """A sampler of global batches from domains by weight, which goes through each domain block by block.

    The domains of step s are drawn by systematic sampling: sequence i is at ``(i + u) / B`` of the cumulative
    weights, with one u per step from Philox(seed, s). Each domain's expected share is its weight, as if every sequence
    were drawn by itself, but in every batch it has the whole number below or above ``B w``: the mixture of a step, and
    so its loss, varies far less. The order within the batch is shuffled, so that any slice of it is a mixture too.

    A domain's blocks are visited in the order of a seeded permutation, all of them once per epoch, a different one
    each.

    Args:
        num_blocks: Number of blocks by domain.
        weights: Non-negative weight by domain; normalised here. Domains that are not named are not used.
        batch_size: Sequences of a global batch, B.
        seed: Seed of everything random, 0 to 2**63 - 1.
        skip: Number of steps skipped at the start: step 0 here is that step of a sampler that skips
            none. Step numbers in states count from there.

    Attributes:
        names: The domains, in order.
        num_blocks: As given.
        batch_size: As given.
        seed: As given.

    Raises:
        UsageError: A weight is invalid, or its domain is unknown or has no block.
    """

    def __init__(
        self,
        num_blocks: Mapping[str, int],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
        *,
        skip: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"A batch of {batch_size} sequences: there must be at least 1.")
        self.names = tuple(num_blocks)
        self.num_blocks = dict(num_blocks)
        self.batch_size, self.seed, self.skip = batch_size, seed, skip
        self._blocks_D = np.array([num_blocks[name] for name in self.names], dtype=np.int64)
        self._log: list[tuple[int, np.ndarray]] = [(0, self._usable(weights))]
        self._next = 0  # the first step that was not drawn
        self._at, self._counts_D = 0, np.zeros(len(self.names), dtype=np.int64)
        self._permutations: dict[tuple[int, int], Permutation] = {}

    def _usable(self, weights: Mapping[str, float]) -> np.ndarray:
        """Return the weights as float64 [D] of sum 1."""
        for name, weight in weights.items():
            if name not in self.num_blocks:
                raise UsageError(f"There is no domain {name!r}.", hint=near_misses(name, list(self.names)))
            if not (np.isfinite(weight) and weight >= 0):
                raise UsageError(f"The weight of the domain {name!r} is {weight}, but must be a number from 0.")
            if weight > 0 and self.num_blocks[name] < 1:
                raise UsageError(
                    f"The domain {name!r} has the weight {weight:g}, but its text is shorter than one block.",
                    hint="Give it more text, take shorter blocks, or set its weight to 0.",
                )
        weights_D = np.array([float(weights.get(name, 0.0)) for name in self.names], dtype=np.float64)
        if not weights_D.sum() > 0:
            raise UsageError("All weights of the mixture are zero.", hint="Give one domain a weight.")
        normal_D: np.ndarray = weights_D / weights_D.sum()
        return normal_D

    # ---- weights ---------------------------------------------------------------------------------------------------

    def set_weights(self, weights: Mapping[str, float], from_step: int) -> None:
        """Change the weights for all steps from ``from_step`` on, up to the next change that is already set.

        Raises:
            UsageError: The step is already drawn (data loaders draw ahead), or a weight is invalid.
        """
        from_step += self.skip
        if from_step < self._next:
            raise UsageError(
                f"The weights cannot change from step {from_step} on: steps up to {self._next - 1} are drawn already.",
                hint=f"Let them change from step {self._next} on, or later.",
            )
        usable = self._usable(weights)
        self._log = sorted([entry for entry in self._log if entry[0] != from_step] + [(from_step, usable)],
                           key=lambda entry: entry[0])  # fmt: skip

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights in effect at a step."""
        return dict(zip(self.names, self._weights(step + self.skip).tolist(), strict=True))

    def _weights(self, step: int) -> np.ndarray:
        return self._log[bisect_right(self._log, step, key=lambda entry: entry[0]) - 1][1]

    # ---- batches ---------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """Return the global batch of a step. Any step is possible; consecutive ones are cheap.

        Cost: O(B). Going back, or ahead by more than a step: see `consumed`.
        """
        if step < 0:
            raise UsageError(f"There is no step {step}.")
        step += self.skip
        before_D = self._seek(step)
        drawn_D = self._drawn(self._weights(step), step, 1)[0]
        domain_B = np.repeat(np.arange(len(self.names)), drawn_D)
        within_B = np.arange(self.batch_size) - np.repeat(np.cumsum(drawn_D) - drawn_D, drawn_D)
        block_B = self._walk(before_D, drawn_D, domain_B, before_D[domain_B] + within_B)
        self._at, self._counts_D = step + 1, before_D + drawn_D
        self._next = max(self._next, step + 1)
        order_B = np.argsort(self._random([0, step, 0, 1], self.batch_size), kind="stable")
        return Batch(domain_B[order_B], block_B[order_B])

    def consumed(self, step: int) -> dict[str, int]:
        """Return how many blocks of each domain the steps before ``step`` use, skipped ones included.

        Cost: about 0.1 s for a million steps.
        """
        return dict(zip(self.names, self._count(0, step + self.skip).tolist(), strict=True))

    def _seek(self, step: int) -> np.ndarray:
        found: np.ndarray = self._count(0, step) if step < self._at else self._counts_D + self._count(self._at, step)
        return found

    def _count(self, start: int, stop: int) -> np.ndarray:
        """Return the blocks used by the steps from ``start`` to before ``stop``, int64 [D]."""
        total_D = np.zeros(len(self.names), dtype=np.int64)
        borders = [entry[0] for entry in self._log if start < entry[0] < stop]
        for first, last in zip([start, *borders], [*borders, stop], strict=True):
            for at in range(first, last, _STEPS_AT_ONCE):
                total_D += self._drawn(self._weights(first), at, min(_STEPS_AT_ONCE, last - at)).sum(0)
        return total_D

    def _drawn(self, weights_D: np.ndarray, start: int, steps: int) -> np.ndarray:
        """Return the sequences of each domain in steps with the same weights, int64 [steps, D]."""
        raw_S = self._random([start, 0, 0, 0], 4 * steps)[::4]  # one block of the counter makes four numbers
        u_S = (raw_S >> np.uint64(11)) * 2.0**-53
        edges_D = np.cumsum(weights_D)
        edges_D = np.concatenate([[0.0], edges_D / edges_D[-1]])
        # Sequence i belongs to the domain if its position (i + u) / B is between the edges, the lower one included.
        below_SE = np.ceil(self.batch_size * edges_D[None] - u_S[:, None]).clip(0, self.batch_size)
        below_SE[:, edges_D == 1.0] = self.batch_size  # regardless of rounding
        drawn_SD: np.ndarray = np.diff(below_SE, axis=1).astype(np.int64)
        return drawn_SD

    def _random(self, counter: list[int], count: int) -> np.ndarray:
        """Return uint64 [count]: Philox's own numbers, which are the same in every version of numpy."""
        raw: np.ndarray = np.random.Philox(key=self.seed, counter=np.array(counter, np.uint64)).random_raw(count)
        return raw

    def _walk(self, before_D: np.ndarray, drawn_D: np.ndarray, domain_B: np.ndarray, visit_B: np.ndarray) -> np.ndarray:
        """Return the blocks of visits to domains, int64 [B]; a batch may cover several epochs of a small domain."""
        size_D = np.maximum(self._blocks_D, 1)
        first_D, last_D = before_D // size_D, (before_D + drawn_D - 1) // size_D
        epochs_D = np.where(drawn_D > 0, last_D - first_D + 1, 0)
        permutations = [
            self._permutation(int(domain), int(first_D[domain]) + number)
            for domain in np.flatnonzero(drawn_D)
            for number in range(epochs_D[domain])
        ]
        epoch_B, place_B = np.divmod(visit_B, size_D[domain_B])
        which_B = (np.cumsum(epochs_D) - epochs_D - first_D)[domain_B] + epoch_B
        return permute(permutations, which_B, place_B)

    def _permutation(self, domain: int, epoch: int) -> Permutation:
        if (domain, epoch) not in self._permutations:
            if len(self._permutations) >= _KEPT:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[domain, epoch] = Permutation(int(self._blocks_D[domain]), self.seed, domain, epoch)
        return self._permutations[domain, epoch]

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state from which a later process continues with ``step``, as JSON-compatible data.

        Args:
            step: The first step that was not trained on; None: the first that was not drawn.
        """
        at = self._next if step is None else step + self.skip
        return {
            "step": at,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_blocks": dict(self.num_blocks),
            "weights": [[start, dict(zip(self.names, entry.tolist(), strict=True))] for start, entry in self._log],
            "consumed": self.consumed(at - self.skip),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another sampler of the same corpus, batch size and seed.

        Raises:
            RefusedError: The state is of another one, or its consumption contradicts its weights.
        """
        for key, ours in (("num_blocks", self.num_blocks), ("batch_size", self.batch_size), ("seed", self.seed)):
            if state[key] != ours:
                raise RefusedError(
                    f"The run to go on with had {key} = {state[key]}, and this one has {ours}: it would see other text.",
                    hint="Give the same tokens, length of blocks, batch size and seed, or begin a new run.",
                )
        # Unchanged, not normalised again: a second division could change the last bit.
        log = [(int(start), np.array([entry[name] for name in self.names])) for start, entry in state["weights"]]
        before = self._log, self._next, self._at, self._counts_D
        self._log, self._next = log, int(state["step"])
        self._at, self._counts_D = 0, np.zeros(len(self.names), dtype=np.int64)
        self._counts_D, self._at = self._count(0, self._next), self._next
        if dict(zip(self.names, self._counts_D.tolist(), strict=True)) != dict(state["consumed"]):
            self._log, self._next, self._at, self._counts_D = before
            raise RefusedError(
                "The state of the mixture contradicts itself: what was consumed does not follow from the weights.",
                hint="Resume from another checkpoint.",
            )
