"""HunYuan V1 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common, named_head_dim
from .fields import DECODER, TOKEN, Field, Fields, sizes


class HunYuanV1Dense(Source):
    """Llama with an RMSNorm on each head of q and k after rotary positions, whose base may be stretched (``alpha``)."""

    name = "hunyuan_v1_dense"
    summary = "HunYuan V1 (dense), norms on queries and keys after rotary positions"
    reference = "https://huggingface.co/tencent/Hunyuan-7B-Instruct"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(290943, 4096, 11008, layers=32, heads=32, positions=2048),
        "rms_norm_eps": Field(float, 1e-5),
        "pad_token_id": Field(TOKEN, 0),
        "eod_token_id": Field(TOKEN, 3),
        "pretraining_tp": Field(int, 1),
        "attention_bias": Field(bool, False),
        "head_dim": Field(int | None, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config["attention_bias"])
        head_dim = named_head_dim(config)
        return common(self.name, config, head_dim=head_dim, qkv_bias=bias, o_bias=bias, qk_norm="turned")
