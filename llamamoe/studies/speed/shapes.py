"""Shapes whose speed is measured: of the FFN (experts, selected, shared), and of the model around it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from ...architectures.sources.base import DenseSpec
from ...conversion.plan import SplitPlan
from ...conversion.recipe import SplitRecipe, build_recipe

SOURCE = "source"
"""Name of the shape of the study's own dense model."""


@dataclass(frozen=True)
class ModelShape:
    """A dense Llama with random weights for measuring speeds.

    Attributes:
        name: Its name in options and tables.
        hidden_size: H.
        intermediate_size: F.
        num_layers: Number of layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.
        vocab_size: Rows of the embedding table and of the separate head.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    def config(self) -> dict[str, Any]:
        """Return its ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


MODEL_SHAPES = {"1B": ModelShape("1B", 2048, 8192, 8, 32, 8, 16384)}
"""Half of a model of 1B parameters: half of 16 layers and half of a vocabulary of 32k, so that FFNs, attention and head
take the same shares of the time as in the whole."""


@dataclass(frozen=True)
class FfnShape:
    """The sizes that decide the speed of a conversion's FFNs, as shares of the dense one's, so that they fit any model.

    Attributes:
        num_experts: N; 0 for static pruning.
        top_k: k; 0 for static pruning.
        shared: Neurons that every token uses, as a share of F: S / F.
        keep_dense: Layers left dense, as a share of all.
    """

    num_experts: int
    top_k: int
    shared: float
    keep_dense: float = 0.0

    @classmethod
    def of(cls, plan: SplitPlan) -> FfnShape:
        """Return the shape of a conversion."""
        layout, spec = plan.layout, plan.model.spec
        shared = round(layout.num_shared / spec.intermediate_size, 4)
        return cls(layout.num_experts, layout.top_k, shared, round(len(layout.dense_layers) / spec.num_layers, 4))

    @property
    def name(self) -> str:
        """Its name, such as ``12 of 32 + 1/8`` or ``static 1/2``."""
        close = Fraction(self.shared).limit_denominator(16)
        share = str(close) if abs(close - self.shared) < 5e-4 else f"{self.shared:.3g}"
        if not self.num_experts:
            return f"static {share}"
        routed = f"{self.top_k} of {self.num_experts}" + (f" + {share}" if self.shared else "")
        return routed + (f", {self.keep_dense:.0%} of the layers dense" if self.keep_dense else "")

    def recipe(self, spec: DenseSpec, block: int = 1) -> SplitRecipe:
        """Return the recipe of a random conversion of this shape, whose speed is measured.

        Args:
            spec: The dense model.
            block: Divisor of the number of shared neurons.
        """
        shared = round(self.shared * spec.intermediate_size / block) * block
        if not self.num_experts:
            return static_recipe(shared)
        dense = range(round(self.keep_dense * spec.num_layers))
        return build_recipe(
            {
                "method": "random",
                "router": "random",
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "shared": shared,
                "shared_by": "weight_norm",
                "rescale": "unit",  # with which llama.cpp computes qwen2_moe
                "keep_dense": list(dense),
                "card": False,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the shape as JSON-compatible data."""
        return asdict(self)


def static_recipe(kept: int) -> SplitRecipe:
    """Return the recipe of static pruning to a number of neurons."""
    return build_recipe({"method": "static", "shared": kept, "shared_by": "weight_norm", "card": False})
