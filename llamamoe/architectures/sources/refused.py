"""Dense families that no target computes exactly, and why: what `split` and `inspect` say of their checkpoints.

Entries are families of transformers with a well-known model; any other is refused as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

_NO_GATE = "its FFN has no gate: experts of transformers compute down(act(gate x) * up x)"
_GEMMA = (
    "each FFN's output passes a norm before it is added. gemma4, a mixture with such norms, also normalises the values of "
    "attention, and shared and routed neurons apart, and the norm of a sum is not the sum of norms"
)
_ONE_TEXT_MODEL = "its class builds this one text model, whatever text_config names, and transformers has no class around a mixture of it"
_QWEN2_VL = (
    f"{_ONE_TEXT_MODEL}. Of text, its text model computes what qwen2 does: save it as that, without the vision tower"
)

REFUSED: Mapping[str, str] = {
    "apertus": _NO_GATE,
    "bloom": _NO_GATE,
    "exaone4": "attention and FFN read the residual stream as it is, and norms follow them. exaone_moe has norms before them; "
    "flex_olmo has them after, but normalises the queries of all heads together, not those of each head",
    "falcon": _NO_GATE,
    "gemma2": f"its attention scores are capped by tanh, and {_GEMMA}",
    "gemma3_text": f"{_GEMMA}. afmoe and kolibri1 have no rotary positions in layers of full attention",
    "glm4": "outputs of attention and FFN pass a norm before they are added: the mixtures of that shape (afmoe, kolibri1) "
    "always normalise queries and keys, which it does not",
    "glm4v": "outputs of attention and FFN pass a norm before they are added, which they do not in glm4v_moe, the class around a "
    "mixture",
    "gpt2": _NO_GATE,
    "gpt_neox": _NO_GATE,
    "gptj": _NO_GATE,
    "llama4_text": "its dense layers stand between layers of experts, and llama4 has one number and one width of experts for all "
    "layers, into which the FFNs of dense layers cannot be partitioned; no other mixture has its attention (chunks, queries "
    "scaled by position)",
    "ministral3": "queries are multiplied by 1 + beta log(1 + floor(position / length)) (llama_4_scaling_beta). mistral4, a "
    "mixture that does so, has attention through normalised latents (MLA)",
    "mllama": f"{_ONE_TEXT_MODEL}; some of its layers attend to the image",
    "mpt": _NO_GATE,
    "nemotron": _NO_GATE,
    "olmo": "its norms have no weights and subtract the mean (LayerNorm): cohere2_moe is the only mixture with LayerNorms, and "
    "has attention and FFN side by side",
    "olmo3": "attention has sliding windows in some layers: flex_olmo, the mixture with its norms after attention and FFN, has "
    "full attention only",
    "opt": _NO_GATE,
    "phi": _NO_GATE,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_vl": _QWEN2_VL,
    "stablelm": "its norms subtract the mean and have biases (LayerNorm): norms of mixtures have none",
    "starcoder2": _NO_GATE,
}
"""The reason by ``model_type``."""
