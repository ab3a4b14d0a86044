"""Models of images and text whose class builds one text model, and the class around the mixture of that text model.

Both classes of a pair have the same vision tower, with tensors of the same names; only the text model differs.
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
        mixture: The ``model_type`` of the text model that it builds.
    """

    whole: str
    architecture: str
    mixture: str


PAIRS: Mapping[str, Pair] = {
    "qwen3_5": Pair("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
}
"""By the ``model_type`` of the dense parent."""
LEFT_OUT = "mtp."
"""Begins the names of tensors that predict further tokens: transformers ignores them, and their layer is a dense one."""


def outer_keys(whole: Mapping[str, Any], text_type: str) -> dict[str, Any]:
    """Return the keys of ``config.json`` around a text model that differ from the parent's.

    Args:
        whole: The parent's ``config.json``.
        text_type: The ``model_type`` of the text model in its place.
    """
    name = str(whole.get("model_type"))
    pair = PAIRS.get(name)
    if pair is None or text_type != pair.mixture:
        return {}
    vision = dict(whole.get("vision_config") or {})
    if str(vision.get("model_type", "")).startswith(name):  # "qwen3_5_vision", in older files "qwen3_5"
        vision["model_type"] = pair.whole + vision["model_type"].removeprefix(name)
    return {"model_type": pair.whole, "architectures": [pair.architecture], "vision_config": vision}
