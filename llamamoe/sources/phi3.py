"""Phi-3 and Phi-4 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import DenseSpec, Read, Source, canonical_shapes, common, number


class Phi3(Source):
    """Llama whose files fuse q, k, v into ``qkv_proj`` and gate, up into ``gate_up_proj``."""

    name = "phi3"
    summary = "Phi-3 and Phi-4 (fused projections are taken apart)"
    reference = "arXiv:2404.14219"

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        nested = config.get("rope_parameters") or {}
        partial = number(config, "partial_rotary_factor", float(nested.get("partial_rotary_factor", 1.0)))
        base = common(
            self.name, config, sliding=(config.get("sliding_window"),) * int(config.get("num_hidden_layers") or 0)
        )
        rope = {k: v for k, v in base.rope.items() if k != "partial_rotary_factor"}
        if rope["rope_type"] in ("su", "yarn"):  # transformers reads both as longrope for this family
            rope["rope_type"] = "longrope"
        if rope["rope_type"] == "longrope":
            rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings", 4096))
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
        shapes = dict(canonical_shapes(spec))
        raw: dict[str, tuple[int, ...]] = {}
        for name, read in self.canonical(spec).items():
            rows = raw.get(read.name, (0,))[0] + shapes[name][0]
            raw[read.name] = (rows, *shapes[name][1:])
        return raw
