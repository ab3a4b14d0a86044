"""Limits of training engines that read our checkpoints, as far as they read them exactly; see ``tests/engines``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..moe_layout import MoeLayout
from ..sources.base import DenseSpec

_MAPPED = ("glm4_moe", "qwen3_moe")
_ROPES = ("default", "yarn")


def engine_refusals(engine: str, target: str, dense: DenseSpec, layout: MoeLayout) -> Iterator[str]:
    """Yield the reasons why a training engine would refuse a conversion, or compute something else without an error.

    Args:
        engine: One of `ENGINES`.
        target: Name of the target.
        dense: The source.
        layout: The sizes.
    """
    yield from ENGINES[engine](target, dense, layout)


def automodel_refusals(target: str, dense: DenseSpec, layout: MoeLayout) -> Iterator[str]:
    """Yield what NeMo AutoModel's own models do otherwise; see `engine_refusals`.

    It runs the other targets by transformers' classes, without its own kernels and without expert parallelism.
    ``ernie4_5_moe`` has an own model, which needs tied embeddings.
    """
    if target not in _MAPPED:
        yield f"NeMo AutoModel has no model of its own that computes {target}, but {' and '.join(_MAPPED)}"
        return
    rope = str(dense.rope.get("rope_type", "default"))
    if rope != "default":
        yield f"NeMo AutoModel computes positions of rope_type {rope!r} otherwise than transformers"
    if dense.sliding and any(dense.sliding):
        yield "NeMo AutoModel ignores the attention window"
    if layout.top_k == 1:
        yield "NeMo AutoModel divides the weights of selected experts by their sum if there are several, and never that of one"


def megatron_refusals(target: str, dense: DenseSpec, layout: MoeLayout) -> Iterator[str]:
    """Yield what Megatron-Bridge does otherwise; see `engine_refusals`.

    ``ernie4_5_moe`` is mapped there with a fixed base of its rotary positions and sigmoid routing, so it is not offered.
    """
    if target not in _MAPPED:
        yield f"Megatron-Bridge does not compute {target} exactly, but {' and '.join(_MAPPED)}"
        return
    rope = str(dense.rope.get("rope_type", "default"))
    if rope not in _ROPES:
        yield f"Megatron-Bridge ignores rope_type {rope!r}: positions would be computed without it"
    if dense.sliding and any(dense.sliding):
        yield "Megatron-Bridge ignores the attention window"
    if target == "qwen3_moe":
        if dense.qkv_bias or dense.o_bias:
            yield "Megatron-Bridge reads no attention biases of qwen3_moe"
        if layout.dense_layers:
            yield "Megatron-Bridge takes every layer of qwen3_moe as a mixture of experts: leave out --keep-dense"
        return
    if layout.shared_width != layout.expert_width:
        ratio = layout.shared_width / layout.expert_width
        yield f"Megatron-Bridge takes one shared expert of glm4_moe, as wide as a routed one (--shared 1x), not {ratio:g} times as wide"
    if layout.combine.weighting != "renormalised" or layout.top_k == 1:
        yield "Megatron-Bridge divides the weights of glm4_moe's selected experts by their sum if there are several, and never that of one"


ENGINES: Mapping[str, Callable[[str, DenseSpec, MoeLayout], Iterator[str]]] = {
    "megatron": megatron_refusals,
    "automodel": automodel_refusals,
}
"""The function that yields what a training engine does otherwise, by its name in ``--require``."""
