"""Tiny random dense checkpoints of every family, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3_5Tokenizer

from llamamoe.architectures.targets import TARGETS
from llamamoe.checkpoint.gguf.cuts import CUTS

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}

IMAGE_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}

LICENCE = Path(__file__).parents[1] / "LICENSE"
"""A text that does not change, so that tokenizers and what is measured with them do not."""
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-head-dim": {"model_type": "llama", "head_dim": 32},
    "llama-attention-bias": {"model_type": "llama", "attention_bias": True},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "phi3-window": {"model_type": "phi3", "sliding_window": 8},
    "phi3-longrope": {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "granite": {
        "model_type": "granite",
        "tie_word_embeddings": True,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "gemma": {"model_type": "gemma", "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"},
    "seed-oss": {"model_type": "seed_oss", "head_dim": 16},
    "seed-oss-head-dim": {"model_type": "seed_oss", "head_dim": 32},
    "seed-oss-no-bias": {"model_type": "seed_oss", "head_dim": 16, "attention_bias": False},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 16, "tie_word_embeddings": False},
    "ernie4_5-head-dim": {"model_type": "ernie4_5", "head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    "ministral": {"model_type": "ministral", "sliding_window": 8, "head_dim": 16},
    "ministral-windows": {"model_type": "ministral", "sliding_window": 8, "head_dim": 32}
    | {"layer_types": ["full_attention", "sliding_attention"]},
    "glm": {"model_type": "glm", "head_dim": 32, "partial_rotary_factor": 0.5},
    "glm-no-bias": {"model_type": "glm", "head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}
    | {"partial_rotary_factor": 0.75},
    "internlm3": {"model_type": "internlm3", "head_dim": 32},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 16},
    "hunyuan_v1_dense-alpha": {"model_type": "hunyuan_v1_dense", "head_dim": 32, "attention_bias": True}
    | {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}},
    "olmo2": {"model_type": "olmo2"},
    "olmo2-biases": {"model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True, "head_dim": 32},
    "olmo2-llama3-rope": {"model_type": "olmo2", "rope_parameters": LLAMA3_ROPE},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 0, 1]},
    "smollm3-windows": {"model_type": "smollm3", "no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True}
    | {"sliding_window": 8, "attention_bias": True, "head_dim": 32, "tie_word_embeddings": False}
    | {"rope_parameters": LLAMA3_ROPE},
    "smollm3-rope": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 1]},
    "cohere": {"model_type": "cohere", "attention_bias": True, "logit_scale": 0.3, "rope_parameters": LLAMA3_ROPE},
    "cohere2": {"model_type": "cohere2", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2-biases": {
        "model_type": "cohere2",
        "sliding_window": 8,
        "sliding_window_pattern": 1,
        "attention_bias": True,
    }
    | {"logit_scale": 0.3, "tie_word_embeddings": False, "layer_norm_eps": 1e-3, "rope_parameters": LLAMA3_ROPE},
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    }
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"rope_parameters": IMAGE_ROPE},
    "qwen3_5_text-biases": {"model_type": "qwen3_5_text", "head_dim": 32, "full_attention_interval": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    | {
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5},
    },
    "seed-oss-all-biases": {"model_type": "seed_oss", "head_dim": 16, "attention_out_bias": True},
}
"""Name to configuration keys beyond the common ones."""

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FFN_TARGETS = [target.name for target in TARGETS if target.routed and not target.attention_experts]
"""The targets with any number of experts."""
ROUTED: list[tuple[str, str, Any]] = [
    ("llama", "mixtral", 0),
    ("llama-tied", "qwen2_moe", "1x"),
    ("qwen3-tied", "qwen3_moe", 0),
    ("llama", "glm4_moe", "1x"),
    ("llama-tied", "granitemoeshared", "1x"),
    ("llama", "ernie4_5_moe", "1x"),
    ("smollm3", "granitemoe_swa", "1x"),
    ("olmo2", "flex_olmo", 0),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "1x"),
    ("cohere2", "cohere2_moe", "1x"),
    ("qwen3_5_text", "qwen3_5_moe_text", "1x"),
]
"""A variant of the parent for each of `FFN_TARGETS`, and its shared neurons."""


def variant_for(target: str) -> str:
    """The plainest variant that a target holds: of Llama, or of the family whose norms it has.

    Without a target, of Llama.
    """
    own = {
        "flex_olmo": "olmo2",
        "hunyuan_v1_moe": "hunyuan_v1_dense",
        "cohere2_moe": "cohere2",
        "qwen3_5_moe_text": "qwen3_5_text",
    }
    if target in own:
        return own[target]
    return "llama" if not target or "no_qk_norm" in TARGETS.get(target).holds else "qwen3"


def make_tokenizer(folder: Path, vocab_size: int = 128) -> None:
    """A tokenizer of one token per byte below ``vocab_size - 3``, after <pad>, <bos>, <eos>."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    vocab |= {chr(32 + i): 3 + i for i in range(vocab_size - 3)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_qwen_tokenizer(folder: Path, vocab_size: int = 128) -> None:
    """The same for printable characters, of the class as which transformers opens any tokenizer beside Qwen3.5-MoE."""
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(map(chr, range(33, 127))) - {"Ġ"})
    tokens = ["<pad>", "<bos>", "<eos>", "Ġ", *map(chr, range(33, 127)), *rest][:vocab_size]
    vocab = {token: i for i, token in enumerate(tokens)}
    names = {"unk_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    Qwen3_5Tokenizer(vocab=vocab, merges=[], **names).save_pretrained(folder)


def make_dense(
    folder: Path, variant: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **keys: Any
) -> Path:
    """Save a random dense model (norm weights 1 ± 0.3, biases not zero) with a tokenizer; return the folder.

    Args:
        folder: Where to.
        variant: A key of `VARIANTS`.
        dtype: Dtype of the weights.
        seed: Of the weights.
        **keys: More configuration keys; ``max_shard_size`` goes to ``save_pretrained``.
    """
    save = {"max_shard_size": keys.pop("max_shard_size")} if "max_shard_size" in keys else {}
    given = {**COMMON, **VARIANTS[variant], **keys}
    if "layer_types" in given:
        given["layer_types"] = given["layer_types"][-given["num_hidden_layers"] :]
    config = AutoConfig.for_model(**given)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                centred = config.model_type in ("gemma", "qwen3_5_text") and "linear_attn" not in name
                parameter.copy_((0.0 if centred else 1.0) + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.shape[-1] == 64 else 0.15))
    model.to(dtype).save_pretrained(folder, **save)
    (make_qwen_tokenizer if config.model_type == "qwen3_5_text" else make_tokenizer)(folder, config.vocab_size)
    return folder


def make_byte_level(folder: Path, pre: str = "llama-bpe", vocab_size: int = 300) -> None:
    """A small byte-level tokenizer, after <pad>, <bos>, <eos>, that cuts text as llama.cpp's ``pre`` does."""
    cut = CUTS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut.whole_words))
    first: list[Any] = [pre_tokenizers.Digits(True)] if cut.digits else []
    if cut.regex:
        first = [pre_tokenizers.Split(Regex(cut.regex), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.regex is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    tokenizer.decoder = decoders.ByteLevel()
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 4, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([LICENCE.read_text(encoding="utf-8")], trainer)
    tokenizer.add_tokens(["<tool>"])
    if cut.add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    wrapped.chat_template = "{{ messages[0].content }}"
    wrapped.save_pretrained(folder)
