"""Models of images and text whose class builds one text model, and the class around the mixture of that text model.

Both classes of a pair have the same vision tower, with tensors of the same names; only the text model differs. If
transformers has no causal language model of that text model, it is read as one that computes the same of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pair:
    """The class that takes a dense parent's place.

    Attributes:
        whole: Its ``model_type``.
        architecture: Its name.
        texts: The ``model_type`` of the text models that the parent's class and this one build.
        causal: The ``model_type`` of the causal language models under which these are read and run.
        defaults: Values of the parent's text model for keys that are left out, where `causal` has others.
    """

    whole: str
    architecture: str
    texts: tuple[str, str]
    causal: tuple[str, str]
    defaults: tuple[tuple[str, Any], ...] = ()


_QWEN3_5 = ("qwen3_5_text", "qwen3_5_moe_text")
PAIRS: Mapping[str, Pair] = {
    "qwen3_5": Pair("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", _QWEN3_5, _QWEN3_5),
    "qwen3_vl": Pair(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        ("qwen3_vl_text", "qwen3_vl_moe_text"),
        ("qwen3", "qwen3_moe"),
        (("max_position_embeddings", 128000), ("rope_theta", 500000.0)),
    ),
}
"""By the ``model_type`` of the dense parent."""
LEFT_OUT = "mtp."
"""Begins the names of tensors that predict further tokens: transformers ignores them, and their layer is a dense one."""
_BY_TEXT = {
    text: (causal, pair.defaults)
    for pair in PAIRS.values()
    for text, causal in zip(pair.texts, pair.causal, strict=True)
    if text != causal
}
_ROPE = ("rope_parameters", "rope_scaling")
_OF_IMAGES = "mrope_"
"""Begins the keys of rotary positions that apply to images only: of text, all sections have the same positions."""


def causal_type(model_type: str) -> str:
    """Return the ``model_type`` of the causal language model as which a text model is read and run."""
    return _BY_TEXT[model_type][0] if model_type in _BY_TEXT else model_type


def as_causal(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a text model as that of a causal language model, which transformers has."""
    found = dict(text)
    if found.get("model_type") not in _BY_TEXT:
        return found
    found["model_type"], defaults = _BY_TEXT[found["model_type"]]
    for key in _ROPE:
        if isinstance(found.get(key), Mapping):
            found[key] = {k: v for k, v in found[key].items() if not k.startswith(_OF_IMAGES)}
    return dict(defaults) | {key: value for key, value in found.items() if key != "architectures"}


def class_refusals(whole: str, target: str) -> list[str]:
    """Return the reason why the class in a parent's place does not build a target; empty if it does, or if any does.

    Args:
        whole: The ``model_type`` of the parent, empty if it is a text model of its own.
        target: The name of the target.
    """
    pair = PAIRS.get(whole)
    if pair is None or target == pair.causal[1]:
        return []
    return [f"{target} is not the text model that the class of {pair.whole} builds ({pair.causal[1]})"]


def outer_config(whole: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parent's ``config.json`` with another text model, and the class that builds this one.

    Args:
        whole: The parent's ``config.json``.
        text: The configuration of the new text model as that of a causal language model.
    """
    name = str(whole.get("model_type"))
    pair = PAIRS.get(name)
    if pair is None:
        return {**whole, "text_config": dict(text)}
    mixture = text["model_type"] == pair.causal[1]
    changed: dict[str, Any] = {"text_config": _as_text(text, whole["text_config"], pair.texts[mixture])}
    if mixture:
        vision = dict(whole.get("vision_config") or {})
        if str(vision.get("model_type", "")).startswith(name):  # "qwen3_5_vision", in older files "qwen3_5"
            vision["model_type"] = pair.whole + vision["model_type"].removeprefix(name)
        changed |= {"model_type": pair.whole, "architectures": [pair.architecture], "vision_config": vision}
    return {**whole, **changed}


def _as_text(text: Mapping[str, Any], parent: Mapping[str, Any], text_type: str) -> dict[str, Any]:
    """Return a configuration as that of a text model, with the parent's rotary positions of images; see `as_causal`."""
    if text["model_type"] == text_type:
        return dict(text)
    found = {key: value for key, value in text.items() if key != "architectures"} | {"model_type": text_type}
    given: Mapping[str, Any] = next((parent[key] for key in reversed(_ROPE) if parent.get(key)), {})
    images = {key: value for key, value in given.items() if key.startswith(_OF_IMAGES)}
    if images:
        rope = found["rope_parameters"] | images
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        found |= {"rope_parameters": rope, "rope_scaling": scaling}
    return found
