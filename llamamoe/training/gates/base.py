"""The interface of a gate, which replaces a native router's forward pass in training."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from ...errors import RefusedError
from ...lazy import dist, torch
from ...plugins import Plugin
from ...words import plural
from ..moe_layers import Decisions, MoeLayer

Native = Callable[["torch.Tensor"], Decisions]
"""The native router's forward: from hidden states to its decisions."""


@dataclass(frozen=True)
class Gated:
    """The result of a gate: the router's output, and further keyword arguments of `Routing`."""

    logits_TN: torch.Tensor
    weights_Tk: torch.Tensor
    indices_Tk: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


class Gate(Plugin, ABC):
    """A replacement of the forward pass of native routers in training mode.

    Routers keep their parameters and names, so that a native checkpoint is saved. A gate's own parameters
    belong to the gate (`parameters`, `state_dict`) and to the state of the training run.

    Everything random is drawn from (seed, step, micro-batch, rank, layer), see `set_step`: a resumed run draws the
    same, and so does the second forward pass of gradient checkpointing.

    Attributes:
        top_k: The only supported k; None for any.
        noisy: Whether it selects by noisy logits, and returns them (``selection_TN``) and the noise (``noise_std_TN``).
        allows_bias: Whether selection by a correction bias keeps its meaning.
        replaces: Whether it replaces anything; False for the native routing itself.
        kept_TN: For the estimate of a run: float32 arrays ``[T, N]`` of a layer that the backward pass keeps beside the
            native router's.
        kept_TH: The same of arrays ``[T, H]``.
    """

    top_k: ClassVar[int | None] = None
    noisy: ClassVar[bool] = False
    allows_bias: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    kept_TN: ClassVar[int] = 0
    kept_TH: ClassVar[int] = 0

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self._seed, self._place = 0, (0, 0, 0)
        self._layers: tuple[MoeLayer, ...] = ()
        self._before: dict[tuple[int, str], Any] = {}

    @abstractmethod
    def route(self, moe: MoeLayer, native: Native, hidden: torch.Tensor) -> Gated:
        """Route the tokens of one layer.

        Args:
            moe: The layer.
            native: Its router's own forward pass.
            hidden: ``[..., H]``, inputs of the router.
        """

    def attach(self, layers: Sequence[MoeLayer], seed: int) -> None:
        """Take over the routers of these layers, until `detach`.

        Args:
            layers: All layers of the model.
            seed: Seed of everything random.

        Raises:
            RefusedError: The gate cannot work with a layer; nothing was changed.
        """
        if self._layers:
            raise ValueError(f"the gate {self.name!r} is attached already")
        for moe in layers:
            self._check(moe)
        self._seed, self._layers = seed, tuple(layers)
        for moe in layers if self.replaces else ():
            # Hooks of accelerate may have put a forward on the instance already: it is restored by `detach`.
            self._before[moe.place] = moe.router.__dict__.get("forward")
            moe.router.forward = self._forward(moe)

    def detach(self) -> None:
        """Restore the routers' own forward pass."""
        for moe in self._layers:
            moe.router.__dict__.pop("gate_extra", None)
            if self.replaces:
                del moe.router.forward  # reveals the class's own forward
                if self._before[moe.place] is not None:
                    moe.router.forward = self._before[moe.place]
        self._layers, self._before = (), {}

    def set_step(self, step: int, micro_batch: int = 0, rank: int = 0) -> None:
        """Set the position of the next forward pass in the run, on which alone everything random depends.

        Args:
            step: Number of the optimiser step.
            micro_batch: Number of the micro-batch in the step.
            rank: Rank of this process among those with different data.
        """
        self._place = (step, micro_batch, rank)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the gate's own parameters, to be trained along with the model; empty before `attach`."""
        return iter(())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the values of `parameters`, for the state of the training run."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the values of `state_dict`; after `attach`."""
        if state:
            raise ValueError(f"the gate {self.name!r} has no parameters, but a state holds {sorted(state)}")

    def average_gradients(self) -> None:
        """Average the gradients of `parameters` over ranks, since DDP and FSDP do not handle them.

        To be called before each optimiser step; does nothing in a run of one process.
        """
        from ..ranks import several_ranks

        if not several_ranks():
            return
        for parameter in self.parameters():
            if parameter.grad is None:  # every rank must take part
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    def generator(self, moe: MoeLayer, device: torch.device) -> torch.Generator:
        """Return a new generator for one layer's forward pass at the position of `set_step`."""
        key = ":".join(str(part) for part in (self._seed, *self._place, moe.key))
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)

    def _forward(self, moe: MoeLayer) -> Any:
        own: Any = moe.router.forward

        def native(hidden: torch.Tensor) -> Decisions:
            return moe.decisions(own(hidden))

        def forward(hidden: torch.Tensor) -> tuple[Any, ...]:
            if not moe.router.training:
                moe.router.__dict__.pop("gate_extra", None)
                return own(hidden)  # type: ignore[no-any-return]
            gated = self.route(moe, native, hidden)
            moe.router.gate_extra = gated.extra  # type: ignore[assignment]
            return moe.native_output((gated.logits_TN, gated.weights_Tk, gated.indices_Tk))

        forward.gate = self  # type: ignore[attr-defined]
        return forward

    def _check(self, moe: MoeLayer) -> None:
        if isinstance(getattr(moe.router.__dict__.get("forward"), "gate", None), Gate):
            raise ValueError(f"layer {moe.layer}: another gate is attached to the router")
        if self.top_k is not None and moe.top_k != self.top_k:
            raise RefusedError(
                f"the gate {self.name!r} routes each token to {plural(self.top_k, 'expert')}, but the model selects "
                f"{moe.top_k} (layer {moe.layer}).",
                hint=f"Choose the gate top_k, or convert the model with --top-k {self.top_k}.",
            )
        bias = moe.correction_bias
        if not self.allows_bias and bias is not None and bool(bias.any()):
            raise RefusedError(
                f"the gate {self.name!r} selects by noisy logits alone, but layer {moe.layer} has a correction bias that "
                "is not zero.",
                hint="Choose the gate top_k or jitter together with loss-free balancing.",
            )
