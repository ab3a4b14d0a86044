"""Complete configurations that transformers 5 wrote, so that 4.57 computes the same.

``save_pretrained`` and the Trainer of transformers 5 write rope and a few names in a new spelling only. Transformers
4.57 does not read it and falls back to its defaults without a warning: the model loads, and its logits are wrong. The
old spelling is added beside the new one, with the same content, so that nothing changes for transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RefusedError
from .sources import SOURCES
from .targets import TARGETS

_RENAMED = {"qwen3_moe": (("num_local_experts", "num_experts"),)}
"""Per model_type: the key that transformers 5 writes, and the one that 4.57 reads."""
_LONGROPE_ONLY = ("phi3",)
"""Families that 4.57 checks for a ``rope_scaling`` of exactly type, short_factor and long_factor."""

PLAIN_ROPE_ONLY = ("olmo2",)
"""Families whose configuration 4.57 refuses with both spellings of a ``rope_scaling``'s type, or with more than a factor."""


def missing_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys to add to a configuration for transformers 4.57; none if it does not have the architecture.

    Raises:
        RefusedError: 4.57 cannot express it.
    """
    name = str(config["model_type"])
    if only_five(name):
        return {}
    _check_holdable(name, config)
    wanted = _rope(name, config)
    wanted |= {old: config[new] for new, old in _RENAMED.get(name, ()) if new in config}
    if config.get("dtype") is not None:
        wanted["torch_dtype"] = config["dtype"]
    # Existing keys are kept: they hold the same, or transformers 5 reads them too and its result must not change.
    return {key: value for key, value in wanted.items() if config.get(key) is None and value is not None}


def addable_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `missing_keys`, or none where 4.57 cannot express the configuration: the model then needs transformers 5."""
    try:
        return missing_keys(config)
    except RefusedError:
        return {}


def only_five(name: str) -> bool:
    """Return whether an architecture is a target or a family that transformers 4.57 does not have."""
    return (name in TARGETS and TARGETS.get(name).only_five) or (name in SOURCES and SOURCES.get(name).only_five)


def _check_holdable(name: str, config: Mapping[str, Any]) -> None:
    """Refuse configurations for which 4.57's class of that name computes something else, however spelled."""
    needs_five = TARGETS.get(name).needs_five if name in TARGETS else frozenset()
    if "mixed_windows" in needs_five and len(set(config.get("layer_types") or ())) > 1:
        raise RefusedError(
            f"config.json: layer_types differ, but {name} has one attention window in transformers 4.57."
        )
    head_dim, heads, hidden = (config.get(k) for k in ("head_dim", "num_attention_heads", "hidden_size"))
    if head_dim and heads and hidden and "head_dim" in needs_five and head_dim * heads != hidden:
        raise RefusedError(
            f"config.json: head_dim = {head_dim}, but transformers 4.57 assumes {hidden} / {heads} for {name}."
        )


def _rope(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the old spelling of rope; empty if the configuration does not use the new one."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise RefusedError("config.json: rope_parameters differ between layers, which transformers 4.57 cannot hold.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    original = rope.get("original_max_position_embeddings") if kind != "default" else None
    wanted = {
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "original_max_position_embeddings": original,
    }
    if kind != "default" and name in PLAIN_ROPE_ONLY:
        raise RefusedError(f"config.json: transformers 4.57 has no {kind} rope for {name}.")
    if kind != "default":
        wanted["rope_scaling"] = _longrope(name, config, scaling) if kind == "longrope" else scaling
        if name in _LONGROPE_ONLY and kind != "longrope":
            raise RefusedError(f"config.json: transformers 4.57 has no {kind} rope for {name}.")
    return wanted


def _longrope(name: str, config: Mapping[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Return longrope for 4.57, which always takes the factor to be the ratio of the two context lengths."""
    ratio = (config.get("max_position_embeddings") or 0) / (scaling.get("original_max_position_embeddings") or 1)
    factor = scaling.get("factor")
    strange = scaling.get("attention_factor") is None and factor is not None and factor != ratio
    if strange or (name in _LONGROPE_ONLY and scaling.get("attention_factor") is not None):
        raise RefusedError(
            f"config.json: transformers 4.57 cannot scale {name}'s attention by the longrope factor given here."
        )
    if name in _LONGROPE_ONLY:
        return {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    return scaling
