"""Gemma 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Read, Source, canonical_shapes, common, positive
from .fields import DECODER, TOKEN, TOKENS, Field, Fields, sizes


class Gemma(Source):
    """Llama with norms of weight ``1 + w``, embeddings times ``sqrt(hidden_size)`` and a tanh GELU gate.

    The norm's 1 is added on reading, which only float32 holds exactly.
    """

    name = "gemma"
    summary = "Gemma 1 (needs --dtype float32, see the plan)"
    reference = "arXiv:2403.08295"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(256000, 3072, 24576, layers=28, heads=16, positions=8192),
        "num_key_value_heads": Field(int, 16),
        "head_dim": Field(int, 256),
        "hidden_act": Field(str, "gelu_pytorch_tanh"),
        "tie_word_embeddings": Field(bool, True),
        "bos_token_id": Field(TOKEN, 2),
        "eos_token_id": Field(TOKENS, 1),
        "pad_token_id": Field(TOKEN, 0),
        "attention_bias": Field(bool, False),
        "use_bidirectional_attention": Field(bool | None, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        # transformers 4.57 and 5 compute hidden_act; hidden_activation, which old files hold, is not read by either.
        act = config.get("hidden_act", "gelu_pytorch_tanh")
        if config.get("use_bidirectional_attention"):
            raise CheckpointError("config.json: use_bidirectional_attention is set, but every target is causal.")
        bias = bool(config.get("attention_bias", False))
        return common(
            self.name,
            config,
            head_dim=positive(config, "head_dim", 256),
            hidden_act="gelu_pytorch_tanh" if act == "gelu" else act,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
            qkv_bias=bias,
            o_bias=bias,
            embedding_multiplier=math.sqrt(positive(config, "hidden_size")),
            norm_offset=1.0,
        )

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        return {
            name: Read(name, ops=(("add", 1.0),) if name.endswith("norm.weight") else ())
            for name in canonical_shapes(spec)
        }
