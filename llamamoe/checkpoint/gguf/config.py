"""Translate a GGUF file's metadata into the configuration and tensor names of transformers.

Metadata that change the model's output and cannot be expressed in transformers are refused, never dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from .header import GgufHeader, GgufTensor
from .rope import ORIGINAL, Keys, rope_parameters


@dataclass(frozen=True)
class Layout:
    """The format in which llama.cpp stores one architecture.

    Attributes:
        model_type: Its name in transformers.
        architecture: Its class in transformers.
        permuted: Whether the rows of q and k are interleaved for llama.cpp's rotary embedding.
        biases: The projections that have a bias in transformers: always (``required``) or all or none.
        biases_required: Whether ``biases`` are required.
        qk_norm: Whether each head's queries and keys are normalised.
        norm_offset: The number that llama.cpp adds to the weights of norms.
        hidden_act: The activation.
    """

    model_type: str
    architecture: str
    permuted: bool = False
    biases: tuple[str, ...] = ()
    biases_required: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    hidden_act: str = "silu"


_QKVO = ("attn_q", "attn_k", "attn_v", "attn_output")
LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", "LlamaForCausalLM", permuted=True, biases=_QKVO),
    "granite": Layout("granite", "GraniteForCausalLM", permuted=True, biases=_QKVO),
    "qwen2": Layout("qwen2", "Qwen2ForCausalLM", biases=_QKVO[:3], biases_required=True),
    "qwen3": Layout("qwen3", "Qwen3ForCausalLM", biases=_QKVO, qk_norm=True),
    "gemma": Layout("gemma", "GemmaForCausalLM", norm_offset=1.0, hidden_act="gelu_pytorch_tanh"),
}
"""The architectures that can be carried over exactly. Mistral's files name the equivalent ``llama``."""

PROJECTIONS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Names of a layer's matrices in llama.cpp and transformers."""
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
"""Names of a layer's norms in llama.cpp and transformers."""
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GRANITE = {
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling", "attention.scale": "attention_multiplier",
}  # fmt: skip
_UNDERSTOOD = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.finetuned",
    "tensor_data_layout", "expert_count", "expert_used_count",
}  # fmt: skip
_CHANGES_OUTPUT = (
    "expert_", "attention.sliding_window", "attention.scale", "attention.max_alibi_bias", "attention.clamp_kqv",
    "attention.temperature", "attention.layer_indices", "attn_logit_softcapping", "final_logit_softcapping",
    "embedding_scale", "residual_scale", "logit_scale", "use_parallel_residual", "pooling_type",
    "rope.dimension_sections", "rope.scaling.", "rope.freq_base_swa", "nextn_predict_layers", "swin_norm",
    "deepstack", "embedding_length_per_layer", "no_rope_layer_interval",
)  # fmt: skip


def layout_of(header: GgufHeader) -> Layout:
    """Return the layout of the file's architecture.

    Raises:
        CheckpointError: The file is not a dense language model, or its architecture is not supported.
    """
    metadata, path = header.metadata, header.path
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
        if not isinstance(metadata.get(key, ""), str):
            raise CheckpointError(f"{path}: {key} = {metadata[key]!r}, but it must be a name.", hint=ORIGINAL)
    kind = metadata.get("general.type", "model")
    arch = metadata.get("general.architecture")
    if kind != "model" or not isinstance(arch, str):
        raise CheckpointError(f"{path} holds no language model (general.type {kind!r}, architecture {arch!r}).")
    experts = metadata.get(f"{arch}.expert_count", 0)
    packed = next((n for n in header.tensors if "_exps." in n or ".ffn_gate_inp." in n), None)
    if experts or packed:
        raise CheckpointError(
            f"{path} is already a mixture of experts ({experts or 'some'} experts; architecture {arch!r}).",
            hint="GGUF files are read of dense models only: give the folder that it was exported from, or a dense model to split.",
        )
    if arch not in LAYOUTS:
        raise CheckpointError(
            f"{path}: the GGUF architecture {arch!r} is not supported ({', '.join(sorted(LAYOUTS))} are).",
            hint=ORIGINAL,
        )
    return LAYOUTS[arch]


def build_config(header: GgufHeader, layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Return the model's ``config.json`` in transformers 5's spelling, and notes about unused metadata.

    Raises:
        CheckpointError: A value is missing, invalid or cannot be carried over exactly.
    """
    keys = Keys(header)
    notes = _check_keys(header, layout)
    hidden, heads, layers = (keys.whole(k) for k in ("embedding_length", "attention.head_count", "block_count"))
    if layers > len(header.tensors):  # checked before anything is built per layer: a broken header may claim billions
        raise CheckpointError(f"{header.path}: {layers} layers cannot be made of {len(header.tensors)} tensors.")
    head_dim = keys.whole("attention.key_length", hidden // heads)
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{header.path}: keys and values have different widths per head, which Llama cannot hold."
        )
    if (rotated := keys.whole("rope.dimension_count", head_dim)) != head_dim:
        raise CheckpointError(
            f"{header.path}: only {rotated} of {head_dim} dimensions are rotated; that is not supported."
        )
    embedding = header.tensors.get("token_embd.weight")
    ids = token_ids(header.metadata)
    config: dict[str, Any] = {
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "vocab_size": embedding.shape[0] if embedding else keys.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": layout.hidden_act,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(header, keys, head_dim),
        # llama.cpp writes the head only if it differs from the embedding.
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "dtype": _main_dtype(header),
    }
    return config | _family_keys(header, layout, keys, head_dim), notes


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the ids of the special tokens ``bos``, ``eos``, ``pad`` and ``unk``; None for a missing one."""
    # llama.cpp's defaults for a SentencePiece vocabulary without these keys.
    given = {"bos": 1, "eos": 2, "unk": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {short: metadata.get(f"tokenizer.ggml.{long}_token_id", given.get(short)) for short, long in names.items()}


def tensor_table(header: GgufHeader, layout: Layout, config: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """Return the file's tensors by their transformers names.

    Raises:
        CheckpointError: A tensor is missing, has the wrong shape, or does not belong to this architecture.
    """
    table: dict[str, GgufTensor] = {}
    left = dict(header.tensors)
    left.pop("rope_freqs.weight", None)  # part of the configuration
    for name, (stored, shape) in _expected(layout, config).items():
        tensor = left.pop(stored, None)
        if tensor is None:
            raise CheckpointError(
                f"{header.path}: the tensor {stored!r} is missing.", hint="Download or convert it again."
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{header.path}: tensor {stored!r} has shape {tensor.shape}; its metadata require {shape}."
            )
        table[name] = tensor
    if left:
        raise CheckpointError(
            f"{header.path}: {len(left)} tensors have no place in a {layout.model_type} model, "
            f"for example {next(iter(left))!r}.",
            hint=ORIGINAL,
        )
    return table


def _expected(layout: Layout, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return, by transformers name, llama.cpp's name and the shape of each tensor."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": hidden}
    rows |= {"ffn_gate": inner, "ffn_up": inner, "ffn_down": hidden}
    columns = {"attn_output": q, "ffn_down": inner}
    biased = set(layout.biases) if layout.biases_required or config.get("attention_bias") else set()
    biased |= {"ffn_gate", "ffn_up", "ffn_down"} if config.get("mlp_bias") else set()
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (config["vocab_size"], hidden))
    }
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for stored, name in PROJECTIONS.items():
            table[f"{ours}{name}.weight"] = (f"{theirs}{stored}.weight", (rows[stored], columns.get(stored, hidden)))
            if stored in biased:
                table[f"{ours}{name}.bias"] = (f"{theirs}{stored}.bias", (rows[stored],))
        for stored, name in NORMS.items():
            table[f"{ours}{name}.weight"] = (f"{theirs}{stored}.weight", (hidden,))
        for stored, name in _HEAD_NORMS.items() if layout.qk_norm else ():
            table[f"{ours}{name}.weight"] = (f"{theirs}{stored}.weight", (head_dim,))
    table["model.norm.weight"] = ("output_norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        table["lm_head.weight"] = ("output.weight", (config["vocab_size"], hidden))
    return table


def _check_keys(header: GgufHeader, layout: Layout) -> list[str]:
    """Refuse metadata that change the output and are not carried over; return notes about unknown keys."""
    prefix = header.metadata["general.architecture"] + "."
    understood = _UNDERSTOOD | (set(_GRANITE) if layout.model_type == "granite" else set())
    notes: list[str] = []
    for key, value in header.metadata.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in understood or value in (0, False, "", "none"):
            continue
        if name == "attention.causal" and value is True:
            continue
        if name == "attention.causal" or name.startswith(_CHANGES_OUTPUT):
            raise CheckpointError(
                f"{header.path}: {key} = {value!r} changes what the model computes and cannot be carried over.",
                hint=ORIGINAL,
            )
        notes.append(f"the GGUF metadata key {key} is unknown and was not used")
    return notes


def _family_keys(header: GgufHeader, layout: Layout, keys: Keys, head_dim: int) -> dict[str, Any]:
    """Return the configuration keys that only some architectures have."""
    config: dict[str, Any] = {}
    if layout.biases and not layout.biases_required:
        config["attention_bias"] = _all_or_none(header, layout.biases, keys)
    if layout.model_type in ("llama", "granite"):
        config["mlp_bias"] = _all_or_none(header, ("ffn_gate", "ffn_up", "ffn_down"), keys)
    if layout.model_type in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    if layout.model_type == "granite":
        neutral = {"attention.scale": head_dim**-0.5}
        config |= {name: keys.positive(key, neutral.get(key, 1.0)) for key, name in _GRANITE.items()}
    return config


def _all_or_none(header: GgufHeader, projections: Sequence[str], keys: Keys) -> bool:
    """Return whether every layer has biases on all of these projections."""
    layers = keys.whole("block_count")
    names = [f"blk.{layer}.{name}.bias" for layer in range(layers) for name in projections]
    there = [name for name in names if name in header.tensors]
    if there and len(there) < len(names):
        missing = next(name for name in names if name not in header.tensors)
        raise CheckpointError(
            f"{header.path}: {there[0]!r} is present but {missing!r} is missing; transformers has a bias on all of "
            f"{', '.join(projections)} or on none.",
            hint=ORIGINAL,
        )
    return bool(there)


def _main_dtype(header: GgufHeader) -> str:
    """Return the dtype of the matrices as they are read, in transformers' spelling."""
    sizes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.kind if tensor.kind in ("F16", "BF16") else "F32"] += math.prod(tensor.shape)
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return names[sizes.most_common(1)[0][0]] if sizes else "float32"
