"""Determine which models llama.cpp computes as transformers does, and by which architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_checkpoint import ConvertedModel
from ..architectures.moe_layout import RouterWeighting, Weighting
from ..architectures.sources.base import DenseSpec
from ..conversion.plan import SplitPlan
from ..errors import RefusedError

_SILU = ("silu", "swish")


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's architecture for one target.

    Attributes:
        name: Its name in llama.cpp.
        pairs: Whether it rotates neighbouring rows of queries and keys, so that they must be put into that order.
        llama3: Whether it reads the factors of llama3's rope scaling.
        any_head: Whether a head may be wider than hidden size over heads, and the output head be the embedding.
        weighting: Its normalisation of the router's scores.
    """

    name: str
    pairs: bool = True
    llama3: bool = True
    any_head: bool = True
    weighting: Weighting = "renormalised"


ARCHITECTURES = {
    "mixtral": Architecture("llama"),
    "granitemoeshared": Architecture("granitemoe"),
    "qwen2_moe": Architecture("qwen2moe", pairs=False, llama3=False, any_head=False, weighting="softmax"),
}
"""Targets that llama.cpp computes as transformers does, unless `llama_cpp_architecture` refuses the model."""
DENSE = {"llama": Architecture("llama"), "mistral": Architecture("llama")}
"""The same for dense models, by ``model_type``: parents, and results of ``--method static``."""


def dense_architecture(model: DenseModel) -> Architecture:
    """Return llama.cpp's architecture for a dense model of `DENSE`.

    Raises:
        RefusedError: llama.cpp computes a different function.
    """
    found = DENSE[str(model.checkpoint.config["model_type"])]
    if reasons := _differences(found, model.spec):
        raise RefusedError(_refusal(found, reasons))
    return found


def llama_cpp_architecture(model: ConvertedModel) -> Architecture:
    """Return llama.cpp's architecture for a model.

    Raises:
        RefusedError: It has none, or computes a different function; the message names all reasons.
    """
    found, spec = ARCHITECTURES.get(model.target.name), model.spec
    if found is None:
        raise RefusedError(
            f"a GGUF file can be written for {', '.join(ARCHITECTURES)}, but this model is {model.target.name}.",
            hint="Split the parent again with --target granitemoeshared (shared experts) or --target mixtral (none).",
        )
    if reasons := _differences(found, spec, model.experts.dense_layers, model.mixing.weighting):
        raise RefusedError(
            _refusal(found, reasons),
            hint="Split the parent with --target granitemoeshared (shared experts) or mixtral (none), without --keep-dense, and train "
            "that again if this model was trained.",
        )
    return found


def runs_planned(plan: SplitPlan) -> bool:
    """Return whether `export_gguf` will accept the architecture of a planned conversion's result."""
    layout, model_type = plan.layout, plan.config["model_type"]
    if plan.model.part is not None:
        return False
    if not plan.target.routed:
        return model_type in DENSE and not _differences(DENSE[model_type], plan.model.spec)
    found = ARCHITECTURES.get(plan.target.name)
    return found is not None and not _differences(found, plan.model.spec, layout.dense_layers, layout.combine.weighting)


def _refusal(found: Architecture, reasons: Sequence[str]) -> str:
    return f"llama.cpp computes {found.name} differently from this model: {'; '.join(reasons)}."


def _differences(
    found: Architecture,
    spec: DenseSpec,
    dense_layers: Sequence[int] = (),
    weighting: RouterWeighting | None = None,
) -> list[str]:
    """Return what llama.cpp computes differently from transformers; nothing if it computes the same.

    Args:
        found: llama.cpp's architecture.
        spec: Sizes and form of the model without its experts.
        dense_layers: Layers of a mixture that are not mixtures.
        weighting: Normalisation of the router's scores; None for a model without a router.
    """
    reasons = []
    if spec.hidden_act not in _SILU:
        reasons.append(f"it computes FFNs and experts with SiLU, and this model's use {spec.hidden_act!r}")
    if dense_layers:
        reasons.append(f"it has no dense layers there, and {', '.join(map(str, dense_layers))} are")
    if weighting not in (None, found.weighting):
        scales, asks = ("scales", "false") if found.weighting == "renormalised" else ("does not scale", "true")
        reasons.append(
            f"there it {scales} the weights of selected experts to sum to one, and this model's norm_topk_prob is {asks}"
        )
    if spec.rope.get("rope_type") == "llama3" and not found.llama3:
        reasons.append("it drops llama3's rope scaling there")
    if not spec.plain_head_dim and not found.any_head:
        reasons.append("its heads are as wide as hidden size over heads there")
    if any(spec.sliding) and not found.pairs:
        reasons.append("it has no sliding windows there")
    return reasons
