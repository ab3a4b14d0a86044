"""GLM-4 9B as first released (``glm``); GLM-4-0414 is ``glm4``, another architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from .base import DenseSpec, Read, Source, common, fused_shapes, number
from .fields import DECODER, NUMBER, TOKEN, TOKENS, Field, Fields, sizes

_ENDS = [151329, 151336, 151338]
"""The tokens that end a text if ``config.json`` names none."""


class Glm(Source):
    """Llama with rotary positions on half of each head, in neighbouring rows: these are re-ordered on reading (exact)."""

    name = "glm"
    summary = "GLM-4 9B (fused gate and up taken apart, rotary pairs re-ordered)"
    reference = "arXiv:2406.12793"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(151552, 4096, 13696, layers=40, heads=32, positions=131072),
        "num_key_value_heads": Field(int | None, 2),
        "head_dim": Field(int | None, 128),
        "attention_dropout": Field(NUMBER | None, 0.0),
        "rms_norm_eps": Field(float, 1.5625e-07),
        "pad_token_id": Field(TOKEN, 151329),
        "bos_token_id": Field(TOKEN, None),
        "eos_token_id": Field(TOKENS, None),
        "attention_bias": Field(bool, True),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        base = common(self.name, config, qkv_bias=bool(config["attention_bias"]))
        partial = number(base.rope if "partial_rotary_factor" in base.rope else config, "partial_rotary_factor", 0.5)
        rope = {k: v for k, v in base.rope.items() if k != "partial_rotary_factor"}
        ends = _ENDS if config["eos_token_id"] is None else config["eos_token_id"]
        return replace(base, rope=rope, partial_rotary_factor=partial, extra=base.extra | {"eos_token_id": ends})

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
        reads = {}
        for name in super().canonical(spec):
            part, width = name.split(".")[-2], spec.intermediate_size
            if part in ("gate_proj", "up_proj"):
                rows = (0, width) if part == "gate_proj" else (width, 2 * width)
                reads[name] = Read(name.replace(part, "gate_up_proj"), rows)
            else:
                reads[name] = Read(name, paired=heads.get(part, 0), turned=spec.partial_rotary_factor)
        return reads

    def raw_shapes(self, spec: DenseSpec) -> dict[str, tuple[int, ...]]:
        """See `Source.raw_shapes`."""
        return fused_shapes(spec, self.canonical(spec))
