"""Gated delta networks in place of attention, as Qwen3.5 has them in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from .base import positive

LINEAR_KEYS = ("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
               "linear_num_value_heads")  # fmt: skip
"""The keys of their sizes."""


@dataclass(frozen=True)
class LinearAttention:
    """The layers with a gated delta network, and its sizes: kernel of the convolution, widths and numbers of heads."""

    layers: tuple[int, ...]
    kernel: int
    key_dim: int
    value_dim: int
    key_heads: int
    value_heads: int

    @classmethod
    def of(cls, config: Mapping[str, Any], layer_types: list[str]) -> LinearAttention:
        """Read the sizes.

        Raises:
            CheckpointError: A size is not a whole number above 0, or heads do not divide among those of keys.
        """
        layers = tuple(layer for layer, kind in enumerate(layer_types) if kind == "linear_attention")
        found = cls(layers, *(positive(config, key) for key in LINEAR_KEYS))
        if found.value_heads % found.key_heads:
            raise CheckpointError(
                f"config.json: linear_num_value_heads = {found.value_heads} do not divide among linear_num_key_heads = "
                f"{found.key_heads}."
            )
        return found

    def keys(self) -> dict[str, int]:
        """Return the sizes by their configuration keys."""
        sizes = (self.kernel, self.key_dim, self.value_dim, self.key_heads, self.value_heads)
        return dict(zip(LINEAR_KEYS, sizes, strict=True))

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors of one layer's network, without the prefix ``model.layers.N.``."""
        values = self.value_heads * self.value_dim
        mixed = 2 * self.key_heads * self.key_dim + values
        found: dict[str, tuple[int, ...]] = {
            "conv1d.weight": (mixed, 1, self.kernel),
            "dt_bias": (self.value_heads,),
            "A_log": (self.value_heads,),
            "norm.weight": (self.value_dim,),
            "out_proj.weight": (hidden, values),
            "in_proj_qkv.weight": (mixed, hidden),
            "in_proj_z.weight": (values, hidden),
            "in_proj_b.weight": (self.value_heads, hidden),
            "in_proj_a.weight": (self.value_heads, hidden),
        }
        return {f"linear_attn.{name}": shape for name, shape in found.items()}
