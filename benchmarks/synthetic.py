"""Synthetic LLaMA-shaped checkpoints on disk: real sizes, random weights, no model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
LLAMA_3_70B = {
    **LLAMA_2_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def shapes(config: dict) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor of a Llama."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", [hidden]
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{prefix}self_attn.{name}_proj.weight", [rows, hidden]
        yield prefix + "post_attention_layernorm.weight", [hidden]
        yield prefix + "mlp.gate_proj.weight", [ffn, hidden]
        yield prefix + "mlp.up_proj.weight", [ffn, hidden]
        yield prefix + "mlp.down_proj.weight", [hidden, ffn]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [config["vocab_size"], hidden]


def make(folder: Path, config: dict, *, num_shards: int, sparse: bool = False, seed: int = 0) -> None:
    """Write a bf16 checkpoint of random weights; ``sparse`` leaves the data as a hole of the right size."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(shapes(config))
    total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    groups: list[list[tuple[str, list[int]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        if filled >= total / num_shards * len(groups) and len(groups) < num_shards:
            groups.append([])
        groups[-1].append((name, shape))
        filled += 2 * int(np.prod(shape))
    rng = np.random.default_rng(seed)
    # bf16 is the upper half of float32; one block is repeated at changing offsets, so that no two rows are equal
    block = (rng.standard_normal(2**24, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    block = block.astype(np.uint16)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in group:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            weight_map[name] = file
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                out.truncate(8 + len(text) + offset)
                continue
            for _, shape in group:
                left = int(np.prod(shape))
                while left:
                    start = int(rng.integers(0, 2**23))
                    piece = block[start : start + min(left, 2**23)]
                    out.write(piece.tobytes())
                    left -= len(piece)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
