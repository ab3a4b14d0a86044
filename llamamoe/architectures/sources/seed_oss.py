"""Seed-OSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common
from .fields import DECODER, NUMBER, TOKEN, Field, Fields, sizes


class SeedOss(Source):
    """Llama with biases on queries, keys and values."""

    name = "seed_oss"
    summary = "Seed-OSS, biases on queries, keys and values"
    reference = "https://huggingface.co/ByteDance-Seed/Seed-OSS-36B-Instruct"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(155136, 4096, 27648, layers=64, heads=80, positions=524288),
        "num_key_value_heads": Field(int | None, 8),
        "pad_token_id": Field(TOKEN, 1),
        "bos_token_id": Field(TOKEN, 0),
        "pretraining_tp": Field(int, 1),
        "attention_bias": Field(bool, True),
        "attention_out_bias": Field(bool, False),
        "attention_dropout": Field(NUMBER, 0.1),
        "residual_dropout": Field(NUMBER, 0.1),
        "mlp_bias": Field(bool, False),
        "head_dim": Field(int | None, 128),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        return common(
            self.name,
            config,
            qkv_bias=bool(config["attention_bias"]),
            o_bias=bool(config["attention_out_bias"]),
            mlp_bias=bool(config["mlp_bias"]),
        )
