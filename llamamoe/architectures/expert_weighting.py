"""The weights that a converted checkpoint gives to selected experts, read from its configuration."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..checkpoint.text_part import whole_hint
from ..errors import CheckpointError, RefusedError, UsageError, near_misses
from ..lazy import transformers
from .moe_layout import Weighting, weight
from .rescales import RESCALES
from .sources.base import number, positive
from .targets import TARGETS
from .targets.base import Target

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The keys for N in the ``config.json`` of the architectures."""
TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk")
"""The keys for k."""
_ROUTER = re.compile(
    r"\.(mlp|block_sparse_moe)\.gate(\.wg)?\.weight$"
    r"|\.(mlp|block_sparse_moe|self_attention\.experts)\.router(\.layer)?\.weight$"
)
_ROUTED_DOWN = re.compile(
    r"\.experts\.\d+\.(down_proj|w2)\.weight$|\.experts\.down_proj$"
    r"|\.(mlp|block_sparse_moe|self_attention\.experts)\.output_linear\.weight$"
)


@dataclass(frozen=True)
class Mixing:
    """The weights of selected experts at equal logits.

    Attributes:
        target: The architecture.
        num_experts: N.
        top_k: k.
        weighting: Normalisation of the router's scores.
        factor: Factor of the weights in the configuration (1 where it cannot hold one).
    """

    target: Target
    num_experts: int
    top_k: int
    weighting: Weighting
    factor: float

    @property
    def mean_weight(self) -> float:
        """Factor of one selected expert's output when all logits are equal."""
        return self.factor * weight(self.weighting, self.num_experts, self.top_k)


def mixing_of(config: Mapping[str, Any]) -> Mixing:
    """Read the weighting from ``config.json``.

    Raises:
        RefusedError: It is not a mixture of experts of a known architecture.
        CheckpointError: A number in it is invalid.
    """
    name = str(config.get("model_type"))
    if name not in TARGETS or not TARGETS.get(name).routed:
        known = [each for each in TARGETS.names() if TARGETS.get(each).routed]
        raise RefusedError(
            f"model_type {name!r} is not a mixture of experts that llamamoe supports.",
            hint=whole_hint(config, f"Supported: {', '.join(known)}."),
        )
    target = TARGETS.get(name)()
    refuse_unsupported(config)
    stated = next((key for key in EXPERT_KEYS if config.get(key) is not None), EXPERT_KEYS[0])
    num_experts, top_k = positive(config, stated), positive(config, target.top_k_key)
    check_top_k(config)
    weighting = target.weightings[0]
    if len(target.weightings) > 1 and not config.get("norm_topk_prob", target.scaling_knob):
        weighting = target.weightings[1]
    factor = number(config, "routed_scaling_factor", 1.0) if target.scaling_knob else 1.0
    if factor <= 0:
        raise CheckpointError(f"config.json: routed_scaling_factor = {factor!r}, but it must be above 0.")
    return Mixing(target, num_experts, top_k, weighting, factor)


def routes_attention(model_type: object) -> bool:
    """Return whether an architecture (``model_type``) routes attention, too."""
    return isinstance(model_type, str) and model_type in TARGETS and TARGETS.get(model_type).attention_experts


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a target's architecture whose routing is not one that llamamoe writes.

    Raises:
        RefusedError: The configuration has such a value; the message names key and value.
    """
    name = str(config.get("model_type"))
    found = TARGETS.get(name)().unsupported(config) if name in TARGETS else None
    if found is not None:
        raise RefusedError(f"config.json: {found}, which llamamoe does not support for {name}.")


def check_top_k(config: Mapping[str, Any]) -> None:
    """Refuse more selected experts than there are: transformers would fail only when the model runs.

    Args:
        config: ``config.json``; counts that are not numbers are ignored.

    Raises:
        CheckpointError: k is larger than N; the message names both keys.
    """
    here = {key: config[key] for key in (*TOP_K_KEYS, *EXPERT_KEYS) if isinstance(config.get(key), int)}
    for top_k, count in product(TOP_K_KEYS, EXPERT_KEYS):
        if top_k in here and count in here and here[top_k] > here[count]:
            raise CheckpointError(
                f"config.json: {top_k} = {here[top_k]}, but it must be at most {count} = {here[count]}.",
                hint="Download config.json again, or correct it.",
            )


def rescale_of(config: Mapping[str, Any], asked: str | None) -> str | None:
    """Return the name of the rescale in effect: the conversion's, or the requested one if none is recorded.

    Raises:
        UsageError: The name is unknown, or the conversion used another rescale.
    """
    named = (config.get("llamamoe") or {}).get("rescale")
    for name in (named, asked):
        if name is not None and name not in RESCALES:
            raise UsageError(f"{name!r} is not a rescale.", hint=near_misses(str(name), RESCALES.names()))
    if named is not None and asked not in (None, named):
        raise UsageError(
            f"the model was converted with the rescale {named!r}, so {asked!r} does not apply.",
            hint="Omit --rescale.",
        )
    return named or asked


def may_overlap(config: Mapping[str, Any]) -> bool:
    """Return whether neurons of a conversion may be in several experts (`gradient` with overlap `inner`)."""
    block = config.get("llamamoe") or {}
    return block.get("method") == "gradient" and block.get("parity") != "exact"


def equal_pieces(config: Mapping[str, Any]) -> int:
    """Return how many pieces with equal router rows `resplit` made of each expert, 1 if it made none."""
    made = (config.get("llamamoe") or {}).get("resplit") or []
    return math.prod(each["pieces"] for each in made if "calibration_tokens" not in each)


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with every default of its class in transformers, without the ``llamamoe`` entry.

    Raises:
        CheckpointError: Transformers has no such class, or cannot read the configuration.
    """
    # transformers modifies its argument
    given = copy.deepcopy({key: value for key, value in config.items() if key != "llamamoe"})
    try:
        found: dict[str, Any] = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given).to_dict()
    except Exception as error:  # a foreign file can fail in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"config.json cannot be read by transformers: {lines[0]}") from error
    return found


def rescaled_block(block: Mapping[str, Any], *, weights: float = 1.0, config: float = 1.0) -> dict[str, Any]:
    """Return the ``llamamoe`` entry of the configuration after routed outputs were multiplied once more.

    Args:
        block: The entry.
        weights: Factor by which the stored down projections were multiplied.
        config: Factor by which ``routed_scaling_factor`` was multiplied.
    """
    found = dict(block)
    for key, ratio in (("factor", weights * config), ("baked_factor", weights)):
        if isinstance(found.get(key), int | float):
            found[key] *= ratio
    return found


def renormalising(*, sigmoid: bool, num_experts: int, top_k: int) -> dict[str, float]:
    """Return the factors of routed outputs once a router's weights are made to sum to one, for `rescaled_block`.

    Softmax gave each selected expert 1/N and then gives 1/k; sigmoid gave 1/2, for which ``routed_scaling_factor``
    compensates.
    """
    return {"config": 0.5 * top_k} if sigmoid else {"weights": top_k / num_experts}


def is_router(name: str) -> bool:
    """Return whether a tensor holds a router's rows."""
    return _ROUTER.search(name) is not None


def is_routed_down(name: str) -> bool:
    """Return whether a tensor is the down projection of one routed expert, or of all; or the output of attention experts."""
    return _ROUTED_DOWN.search(name) is not None
