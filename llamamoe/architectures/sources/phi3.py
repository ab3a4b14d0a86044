"""Phi-3 and Phi-4 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Read, Source, canonical_shapes, common, fused_shapes, number
from .fields import DECODER, NUMBER, TOKEN, TOKENS, Field, Fields, sizes


class Phi3(Source):
    """Llama whose files fuse q, k, v into ``qkv_proj`` and gate, up into ``gate_up_proj``."""

    name = "phi3"
    summary = "Phi-3 and Phi-4 (fused projections are taken apart)"
    reference = "arXiv:2404.14219"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(32064, 3072, 8192, layers=32, heads=32, positions=4096),
        "resid_pdrop": Field(NUMBER, 0.0),
        "embd_pdrop": Field(NUMBER, 0.0),
        "original_max_position_embeddings": Field(int, 4096),
        "rms_norm_eps": Field(float, 1e-5),
        "eos_token_id": Field(TOKENS, 32000),
        "pad_token_id": Field(TOKEN, 32000),
        "sliding_window": Field(int | None, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        base = common(
            self.name, config, sliding=(config.get("sliding_window"),) * int(config.get("num_hidden_layers") or 0)
        )
        partial = number(base.rope if "partial_rotary_factor" in base.rope else config, "partial_rotary_factor", 1.0)
        rope = {k: v for k, v in base.rope.items() if k != "partial_rotary_factor"}
        if rope["rope_type"] in ("longrope", "yarn"):
            # The key beside rope takes precedence over the one in it and is never missing: the class has a default.
            rope["original_max_position_embeddings"] = config.get("original_max_position_embeddings", 4096)
        if rope["rope_type"] in ("su", "yarn"):  # transformers reads both as longrope for this family
            rope["rope_type"] = "longrope"
            if "original_max_position_embeddings" not in rope:
                raise CheckpointError(
                    "config.json: rope of the type 'su' needs original_max_position_embeddings beside its factors."
                )
        values = {**base.__dict__, "rope": rope, "partial_rotary_factor": partial}
        return DenseSpec(**values)

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        q, kv, width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
        cuts = {
            "self_attn.q_proj": ("self_attn.qkv_proj", (0, q)),
            "self_attn.k_proj": ("self_attn.qkv_proj", (q, q + kv)),
            "self_attn.v_proj": ("self_attn.qkv_proj", (q + kv, q + 2 * kv)),
            "mlp.gate_proj": ("mlp.gate_up_proj", (0, width)),
            "mlp.up_proj": ("mlp.gate_up_proj", (width, 2 * width)),
        }
        reads = {}
        for name in canonical_shapes(spec):
            part = ".".join(name.split(".")[3:5])
            fused = cuts.get(part)
            reads[name] = Read(name.replace(part, fused[0]), fused[1]) if fused else Read(name)
        return reads

    def raw_shapes(self, spec: DenseSpec) -> dict[str, tuple[int, ...]]:
        """See `Source.raw_shapes`."""
        return fused_shapes(spec, self.canonical(spec))
