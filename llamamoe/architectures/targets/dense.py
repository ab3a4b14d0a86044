"""The parent's own dense architecture with a smaller FFN, for methods without routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..moe_layout import MoeLayout, Neurons, OutTensor
from ..sources.base import DenseSpec
from ..sources.features import source_features
from .base import Target
from .qwen3_5_moe_text import HYBRID, hybrid_keys


@dataclass(frozen=True)
class _Form:
    """A dense architecture: its features beyond plain Llama, and which attention projections have biases."""

    model_type: str
    architecture: str
    holds: frozenset[str]
    biases: Literal["none", "qkv", "all or none", "any"]


_FORMS = (
    _Form("llama", "LlamaForCausalLM", frozenset({"no_qk_norm", "head_dim", "qkv_bias", "o_bias"}), "all or none"),
    _Form("mistral", "MistralForCausalLM", frozenset({"no_qk_norm", "head_dim", "window"}), "none"),
    _Form(
        "qwen2",
        "Qwen2ForCausalLM",
        frozenset({"no_qk_norm", "head_dim", "qkv_bias", "window", "mixed_windows"}),
        "qkv",
    ),
    _Form(
        "qwen3",
        "Qwen3ForCausalLM",
        frozenset({"qk_norm", "head_dim", "qkv_bias", "o_bias", "window", "mixed_windows"}),
        "all or none",
    ),
    _Form(
        "granite",
        "GraniteForCausalLM",
        frozenset({"no_qk_norm", "head_dim", "qkv_bias", "o_bias", "multipliers", "logits_scaling"}),
        "all or none",
    ),
    _Form(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        frozenset({"turned_qk_norm", "head_dim", "qkv_bias", "o_bias"}),
        "all or none",
    ),
    _Form(
        "olmo2",
        "Olmo2ForCausalLM",
        frozenset({"whole_qk_norm", "post_norm", "head_dim", "qkv_bias", "o_bias"}),
        "all or none",
    ),
    _Form(
        "ministral",
        "MinistralForCausalLM",
        frozenset({"no_qk_norm", "head_dim", "window", "mixed_windows"}),
        "none",
    ),
    _Form(
        "smollm3",
        "SmolLM3ForCausalLM",
        frozenset({"no_qk_norm", "head_dim", "qkv_bias", "o_bias", "window", "mixed_windows", "no_rope"}),
        "all or none",
    ),
    _Form(
        "cohere2",
        "Cohere2ForCausalLM",
        frozenset({"parallel", "layer_norm", "no_qk_norm", "qkv_bias", "o_bias", "window", "mixed_windows", "no_rope"})
        | {"logits_scaling"},
        "all or none",
    ),
    _Form(
        "cohere",
        "CohereForCausalLM",
        frozenset({"parallel", "layer_norm", "no_qk_norm", "qkv_bias", "o_bias", "logits_scaling"}),
        "all or none",
    ),
    _Form("qwen3_5_text", "Qwen3_5ForCausalLM", HYBRID, "all or none"),
    _Form("seed_oss", "SeedOssForCausalLM", frozenset({"no_qk_norm", "head_dim", "qkv_bias", "o_bias"}), "any"),
)

_SPELLED_AS = {"phi3": "mistral", "gemma": "llama", "ernie4_5": "llama", "internlm3": "llama"}
"""Families whose own files are unlike the canonical tensors. (Llama in transformers 4 warns of Phi-3's longrope.)"""


def _windows(form: _Form, dense: DenseSpec) -> dict[str, Any]:
    """Return the keys of a form whose layers may differ in their windows."""
    window = next(filter(None, dense.sliding), None)
    if form.model_type in ("ministral", "cohere2"):  # transformers builds the mask even if no layer has a window
        return {"sliding_window": window or dense.max_position_embeddings, "layer_types": dense.layer_types}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": dense.num_layers,
        "layer_types": dense.layer_types,
    }


def _refusals(form: _Form, dense: DenseSpec) -> list[str]:
    reasons = [
        f"{form.model_type} cannot hold {sentence}"
        for feature, sentence in source_features(dense).items()
        if feature not in form.holds
    ]
    if form.model_type == "cohere2" and not (dense.parallel and dense.layer_norm and dense.turns_in_windows):
        reasons.append(
            "cohere2 has LayerNorms, attention and FFN side by side, and rotary positions where there is a window"
        )
    if form.biases == "all or none" and dense.qkv_bias != dense.o_bias:
        reasons.append(f"{form.model_type} has biases on all four attention projections or on none")
    if form.biases == "qkv" and not dense.qkv_bias:
        reasons.append(f"{form.model_type} always has biases on the query, key and value projections")
    return reasons


def _form(dense: DenseSpec) -> _Form:
    """Return the parent's own architecture or the one it is written as; else the first that holds it."""
    own = [form for form in _FORMS if form.model_type == _SPELLED_AS.get(dense.family, dense.family)]
    fitting = [form for form in _FORMS if not _refusals(form, dense)]
    return (own or fitting or list(_FORMS))[0]


class Dense(Target):
    """Llama, Mistral, Ministral, Qwen2, Qwen3, Granite, HunYuan V1, OLMo 2, SmolLM3, Cohere 1 and 2, Qwen3.5 or Seed-OSS with the kept neurons as its FFN: no router and no experts.

    Phi-3 (fused projections) is written as Mistral, Gemma (norms of 1 + w), ERNIE 4.5 (other rotary pairs) and InternLM3 as
    Llama, where those hold them.
    """

    name = "dense"
    architecture = "LlamaForCausalLM"
    summary = "the parent's dense architecture with a smaller intermediate_size, for --method static"
    shared = "any"
    routed = False

    def refusals(self, dense: DenseSpec) -> list[str]:
        """See `Target.refusals`."""
        return _refusals(_form(dense), dense)

    def majors(self, dense: DenseSpec) -> tuple[str, ...]:
        """See `Target.majors`: 4.57 has no Qwen3.5, and accepts no rope scaling as it is written for OLMo 2."""
        scaled, form = dense.rope["rope_type"] != "default", _form(dense).model_type
        return ("5",) if form == "qwen3_5_text" or (scaled and form == "olmo2") else super().majors(dense)

    def dense_layer_refusal(self, dense_layers: tuple[int, ...], num_layers: int) -> str | None:
        """See `Target.dense_layer_refusal`: the configuration has one ``intermediate_size``."""
        return "a dense model has one intermediate_size, so --keep-dense is not possible" if dense_layers else None

    def fold(self, dense: DenseSpec) -> float:
        """See `Target.fold`."""
        return 1.0 if "multipliers" in _form(dense).holds else dense.embedding_multiplier

    def turns_neighbours(self, dense: DenseSpec) -> bool:
        """See `Target.turns_neighbours`."""
        return _form(dense).model_type in ("cohere", "cohere2")

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        form = _form(dense)
        keys: dict[str, Any] = {
            "architectures": [form.architecture],
            "model_type": form.model_type,
            "intermediate_size": layout.shared_width,
        }
        if form.biases in ("all or none", "any"):
            keys["attention_bias"] = dense.qkv_bias
        if form.biases == "any":
            keys["attention_out_bias"] = dense.o_bias
        if form.model_type in ("llama", "granite", "seed_oss", "smollm3"):
            keys["mlp_bias"] = False
        if "mixed_windows" in form.holds:
            keys |= _windows(form, dense)
        elif "window" in form.holds:
            keys["sliding_window"] = dense.window
        if dense.linear is not None:
            keys |= hybrid_keys(dense)
        if form.model_type in ("cohere", "cohere2"):
            keys |= {"layer_norm_eps": dense.rms_norm_eps, "logit_scale": 1.0 / dense.logits_scaling}
        elif "no_rope" in form.holds:
            keys["no_rope_layers"] = [int(layer not in dense.no_rope) for layer in range(dense.num_layers)]
        if "multipliers" in form.holds:
            scale = dense.head_dim**-0.5 if dense.attention_multiplier is None else dense.attention_multiplier
            keys |= {
                "attention_multiplier": scale,
                "embedding_multiplier": dense.embedding_multiplier,
                "residual_multiplier": dense.residual_multiplier,
                "logits_scaling": dense.logits_scaling,
            }
        return keys

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`: the kept neurons."""
        block, hidden, width = f"model.layers.{layer}.mlp.", dense.hidden_size, layout.shared_width
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            origin = Neurons(part, "shared")  # type: ignore[arg-type]
            yield OutTensor(f"{block}{part}_proj.weight", shape, "dense_ffn", origin, layer)
