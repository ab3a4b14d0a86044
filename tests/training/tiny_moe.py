"""Tiny random mixtures of experts of every native class that we write."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llamamoe.training.moe_layers import MoeLayer
from llamamoe.training.routing import Routing

N, H, W = 6, 16, 8
COMMON: dict[str, Any] = {
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEYS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": N, "intermediate_size": W},
    "qwen2_moe": {"num_experts": N, "moe_intermediate_size": W, "shared_expert_intermediate_size": 4},
    "qwen3_moe": {"num_experts": N, "moe_intermediate_size": W, "head_dim": 8},
    "glm4_moe": {"n_routed_experts": N, "moe_intermediate_size": W, "n_shared_experts": 1, "first_k_dense_replace": 0}
    | {"routed_scaling_factor": 3.0, "head_dim": 8, "intermediate_size": 8},
    "granitemoeshared": {"num_local_experts": N, "intermediate_size": W, "shared_intermediate_size": 4},
    "hunyuan_v1_moe": {"num_experts": N, "intermediate_size": W, "head_dim": 8},
    "flex_olmo": {"num_experts": N, "intermediate_size": W},
    "jetmoe": {"num_local_experts": N, "intermediate_size": W, "kv_channels": 8},
    "qwen3_5_moe_text": {
        "num_experts": N,
        "moe_intermediate_size": W,
        "shared_expert_intermediate_size": 4,
        "head_dim": 8,
    }
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    | {"full_attention_interval": 2},
    "cohere2_moe": {"num_experts": N, "intermediate_size": W, "head_dim": 8, "num_shared_experts": 1}
    | {"shared_expert_combination_strategy": "sum", "sliding_window": 8, "sliding_window_pattern": 2},
    "granitemoe_swa": {"num_local_experts": N, "intermediate_size": W, "shared_intermediate_size": 4}
    | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "layer_rope_theta": [0.0, 1e4]},
    "ernie4_5_moe": {"moe_num_experts": N, "moe_intermediate_size": W, "moe_k": 2, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 0, "intermediate_size": 8},
}
ARCHITECTURES = sorted(KEYS)


def tiny_moe(name: str, *, seed: int = 0, router_std: float = 0.3, **keys: Any) -> Any:
    """A float32 model in training mode; logits of the routers have a standard deviation of about 4 x ``router_std``."""
    keys = {**COMMON, **KEYS[name], **keys}
    if name == "ernie4_5_moe":
        keys["moe_k"] = keys["num_experts_per_tok"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **keys), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "bias" not in parameter_name:
                parameter.normal_(std=0.25)
            if parameter.shape == (N, H):
                parameter.normal_(std=router_std)
    return model.train()


def input_ids(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def routed(moe: MoeLayer, x_TH: torch.Tensor, **extra: Any) -> Routing:
    """Return the output of the layer's router for these inputs."""
    return Routing(moe, *moe.router(x_TH)[:3], inputs_TH=x_TH, **extra)


def fake_layer(num_experts: int, top_k: int = 2, layer: int = 0, **keys: Any) -> MoeLayer:
    """A layer that is only looked at for its sizes."""
    router = torch.nn.Linear(1, num_experts)
    given: dict[str, Any] = {"weighting": "renormalised", "factor": 1.0, **keys}
    return MoeLayer(layer, "", torch.nn.Module(), router, num_experts, top_k, **given)
