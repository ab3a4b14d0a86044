"""ERNIE 4.5 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Read, Source, common, paired_reads, rope_parameters
from .fields import DECODER, TOKEN, Field, Fields, sizes


class Ernie45(Source):
    """Llama whose rotary positions turn neighbouring rows of queries and keys: these are re-ordered on reading (exact)."""

    name = "ernie4_5"
    summary = "ERNIE 4.5 (dense), rotary pairs re-ordered"
    reference = "ERNIE 4.5 technical report (Baidu, 2025)"
    fields: ClassVar[Fields] = {
        **{key: field for key, field in DECODER.items() if key != "attention_dropout"},
        **sizes(103424, 1024, 3072, layers=18, heads=16, positions=131072),
        "num_key_value_heads": Field(int | None, 2),
        "rms_norm_eps": Field(float, 1e-5),
        "use_cache": Field(bool | None, True),
        "pad_token_id": Field(TOKEN, 0),
        "tie_word_embeddings": Field(bool, True),
        "use_bias": Field(bool | None, False),
        "head_dim": Field(int | None, 128),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config["use_bias"])
        rope = rope_parameters(config, 500000.0)
        return common(self.name, config, rope=rope, qkv_bias=bias, o_bias=bias, mlp_bias=bias)

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        return paired_reads(spec)
