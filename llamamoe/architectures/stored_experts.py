"""Find the mixture of experts in a checkpoint's headers, whoever made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.base import TensorInfo
from ..checkpoint.tensor_names import layer_of
from .costs import role_of
from .expert_weighting import EXPERT_KEYS, TOP_K_KEYS

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_GATE = re.compile(r"(gate_proj|w1|gate_up_proj|input_linear)(\.weight)?$")


@dataclass(frozen=True)
class Experts:
    """The mixture of a checkpoint.

    Attributes:
        num_experts: N, routed experts per layer.
        top_k: k, experts selected per token; N if the configuration does not name it.
        expert_width: Neurons of one routed expert, padding included.
        shared_width: Neurons of the shared expert as stored; 0 if there is none.
        shared_is_stub: Whether that shared expert holds only zeros (recorded for conversions by llamamoe).
        moe_layers: Layers with routed experts.
        dense_layers: Layers with a dense FFN.
        dense_width: Neurons of such a dense FFN; None if there is none.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    shared_is_stub: bool
    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    dense_width: int | None


def stored_experts(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], stub: bool, notes: list[str]
) -> Experts | None:
    """Return the mixture found in the tensors, None if they are dense; k is taken from the configuration.

    Args:
        config: ``config.json``.
        tensors: The headers.
        stub: Whether a shared expert holds only zeros.
        notes: A sentence is appended for every contradiction.
    """
    routed = {name: info for name, info in tensors.items() if role_of(name) == "routed"}
    if not routed:
        return None
    counted = count_experts(routed)
    stated = next((config[key] for key in EXPERT_KEYS if is_size(config.get(key))), counted)
    if stated != counted:
        notes.append(f"config.json names {stated} experts, but the files hold {counted} in one layer")
    top_k = next((config[key] for key in TOP_K_KEYS if is_size(config.get(key))), None)
    if top_k is None or not 1 <= top_k <= counted:
        notes.append(f"config.json names no usable number of selected experts ({top_k!r}): all {counted} are counted")
        top_k = counted
    width = _width(routed)
    shared = _width({n: i for n, i in tensors.items() if role_of(n) == "shared"})
    return Experts(
        num_experts=counted,
        top_k=top_k,
        expert_width=width or 0,
        shared_width=shared or 0,
        shared_is_stub=bool(shared) and stub,
        moe_layers=_layers(routed),
        dense_layers=_layers(n for n in tensors if role_of(n) == "dense_ffn"),
        dense_width=dense_width(tensors),
    )


def count_experts(routed: Mapping[str, TensorInfo]) -> int:
    """Return N: one more than the highest index in the names, or the first size of a tensor that holds all experts."""
    indices = [int(found[1]) for name in routed if (found := _EXPERT.search(name))]
    return max(indices) + 1 if indices else max(info.shape[0] for info in routed.values())


def _width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Return the neurons of the first FFN: rows of its gate, or half the rows where gate and up are one tensor."""
    for name, info in tensors.items():
        found = _GATE.search(name)
        if found and len(info.shape) >= 2:
            rows = info.shape[-2]
            return rows // 2 if found[1] in ("gate_up_proj", "input_linear") else rows
    return None


def dense_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Return the neurons of a dense FFN among the tensors; None if there is none."""
    return _width({name: info for name, info in tensors.items() if role_of(name) == "dense_ffn"})


def _layers(names: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted({layer for name in names if (layer := layer_of(name)) is not None}))


def is_size(value: Any) -> bool:
    """Return whether a value of ``config.json`` is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
