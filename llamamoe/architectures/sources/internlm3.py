"""InternLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Source, common
from .fields import DECODER, TOKEN, Field, Fields, sizes


class InternLm3(Source):
    """Llama, as transformers runs it: with biases on all projections, those of the FFN too, or on none."""

    name = "internlm3"
    summary = "InternLM3, as transformers' own class reads it"
    reference = "https://huggingface.co/internlm/internlm3-8b-instruct"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(128512, 4096, 10240, layers=48, heads=32, positions=32768),
        "num_key_value_heads": Field(int | None, 2),
        "rms_norm_eps": Field(float, 1e-5),
        "pad_token_id": Field(TOKEN, 2),
        "attention_bias": Field(bool, False),
        "mlp_bias": Field(bool, False),
        "head_dim": Field(int | None, 128),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`. Files name the biases ``qkv_bias`` and ``bias``, which take precedence in transformers, too."""
        attention = config.get("qkv_bias", config["attention_bias"])
        ffn = config.get("bias", config["mlp_bias"])
        for key, value in (("qkv_bias", attention), ("bias", ffn)):
            if not isinstance(value, bool):
                raise CheckpointError(f"config.json: {key} = {value!r}, but it must be true or false.")
        if attention != ffn:
            raise CheckpointError(
                f"config.json: attention_bias (qkv_bias) = {attention!r} and mlp_bias (bias) = {ffn!r} differ, which "
                "transformers refuses for InternLM3."
            )
        return common(self.name, config, qkv_bias=attention, o_bias=attention, mlp_bias=ffn)
