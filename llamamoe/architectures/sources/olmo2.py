"""OLMo 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common
from .fields import DECODER, TOKEN, TOKENS, Field, Fields, sizes


class Olmo2(Source):
    """Llama with norms after attention and FFN instead of before, and on all queries and all keys together."""

    name = "olmo2"
    summary = "OLMo 2, norms after attention and FFN"
    reference = "arXiv:2501.00656"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(50304, 4096, 11008, layers=32, heads=32, positions=2048),
        "rms_norm_eps": Field(float, 1e-5),
        "pad_token_id": Field(TOKEN, 1),
        "bos_token_id": Field(TOKEN, None),
        "eos_token_id": Field(TOKENS, 50279),
        "attention_bias": Field(bool, False),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config["attention_bias"])
        return common(self.name, config, qkv_bias=bias, o_bias=bias, qk_norm="whole", post_norm=True)
