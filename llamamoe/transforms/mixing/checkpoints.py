"""Dense checkpoints that are put together from others of the same names and shapes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...checkpoint.base import Checkpoint, TensorInfo
from ...checkpoint.reader import SafetensorsCheckpoint
from ...checkpoint.tensors import torch_dtype
from ...lazy import torch
from ..averaging import average


class JoinedCheckpoint:
    """BASE with the FFNs of another checkpoint; see `Checkpoint`.

    Args:
        base: The checkpoint that gives all but the FFNs.
        ffns: The checkpoint that gives the FFNs.
    """

    def __init__(self, base: Checkpoint, ffns: Checkpoint) -> None:
        self._base, self._ffns = base, ffns
        self.path, self.config, self.notes = base.path, base.config, base.notes
        self.tensors: Mapping[str, TensorInfo] = {name: self._of(name).tensors[name] for name in base.tensors}

    def _of(self, name: str) -> Checkpoint:
        return self._ffns if ".mlp." in name else self._base

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """See `Checkpoint.read`."""
        return self._of(name).read(name, rows)

    def save_tokenizer(self, out: Path) -> list[str]:
        """See `Checkpoint.save_tokenizer`."""
        return self._base.save_tokenizer(out)

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return self._base.fingerprint() + self._ffns.fingerprint()

    def check_unchanged(self) -> None:
        """See `Checkpoint.check_unchanged`."""
        self._base.check_unchanged()
        self._ffns.check_unchanged()


class AveragedCheckpoint(JoinedCheckpoint):
    """The average of checkpoints, with dtypes, configuration and tokenizer of BASE.

    Args:
        base: BASE.
        checkpoints: The checkpoints, none of which has the weight 0.
        shares: Weight of each of them; their sum is 1.
    """

    def __init__(self, base: Checkpoint, checkpoints: Sequence[SafetensorsCheckpoint], shares: Sequence[float]) -> None:
        super().__init__(base, base)
        self._checkpoints, self._shares = tuple(checkpoints), tuple(shares)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """See `Checkpoint.read`."""
        whole = average(self._checkpoints, self._shares, (1.0,) * len(self._shares), name)
        whole = whole.to(torch_dtype(self.tensors[name].dtype))
        return whole if rows is None else whole[slice(*rows)]

    def check_unchanged(self) -> None:
        """See `Checkpoint.check_unchanged`."""
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()
