"""Features of a dense model beyond plain Llama, by the names that targets state in ``holds``."""

from __future__ import annotations

from .base import DenseSpec


def source_features(dense: DenseSpec) -> dict[str, str]:
    """Return the features of a source beyond plain Llama: name, and a phrase for messages."""
    found = {}
    if dense.mlp_bias:
        found["mlp_bias"] = (
            "biases in the FFN (mlp_bias): no architecture of transformers has SwiGLU experts with biases"
        )
    if dense.o_bias:
        found["o_bias"] = "a bias on the attention's output projection (attention_bias)"
    if dense.qkv_bias:
        found["qkv_bias"] = "biases on the query, key and value projections"
    if dense.qk_norm == "whole":
        found["whole_qk_norm"] = "an RMSNorm on the queries of all heads together, and one on the keys"
    elif dense.qk_norm == "turned":
        found["turned_qk_norm"] = (
            "an RMSNorm on queries and keys after their rotary positions (weights that differ within a rotary pair do not "
            "commute with its turn)"
        )
    elif dense.qk_norm == "each":
        found["each_qk_norm"] = "a LayerNorm on queries and keys with weights of its own for each head (use_qk_norm)"
    elif dense.qk_norm:
        found["qk_norm"] = "an RMSNorm on queries and keys"
    else:
        found["no_qk_norm"] = "attention without an RMSNorm on queries and keys (it always applies one)"
    if dense.post_norm:
        found["post_norm"] = "norms after attention and FFN instead of before them"
    if dense.linear is not None:
        found["linear"] = (
            f"gated delta networks in place of attention ({len(dense.linear.layers)} of {dense.num_layers} layers)"
        )
    if dense.gated_attention:
        found["gated_attention"] = "gates on the outputs of attention"
    if dense.zero_centred:
        found["zero_centred"] = "norms by 1 + w, whose weights may round when 1 is added"
    if dense.parallel:
        found["parallel"] = "attention and FFN side by side, behind one norm"
    if dense.layer_norm:
        found["layer_norm"] = "norms that subtract the mean (LayerNorm)"
    if not dense.plain_head_dim:
        found["head_dim"] = f"head_dim = {dense.head_dim}, which is not hidden_size / num_attention_heads"
    if dense.mixed_windows:
        found["mixed_windows"] = "a sliding window in some layers only"
    elif dense.window is not None:
        found["window"] = f"a sliding window ({dense.window})"
    if dense.partial_rotary_factor != 1.0:
        found["partial_rotary"] = (
            f"rotary positions on a part of each head (partial_rotary_factor = {dense.partial_rotary_factor})"
        )
    if dense.no_rope:
        found["no_rope"] = f"layers without rotary positions ({len(dense.no_rope)} of {dense.num_layers})"
    plain_scale = dense.attention_multiplier in (None, dense.head_dim**-0.5)
    if dense.residual_multiplier != 1.0 or not plain_scale:
        found["multipliers"] = "attention or residual multipliers"
    if dense.logits_scaling != 1.0:
        found["logits_scaling"] = f"logits divided by {dense.logits_scaling:g}"
    return found
