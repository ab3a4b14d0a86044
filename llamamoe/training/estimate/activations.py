"""Estimate the bytes that a micro-batch keeps for the backward pass on one device, layer by layer.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count a GPT layer as ``s b h (34 + 5 a s / h)`` bytes. The same
way of counting is used here, but of the operations that transformers' own layers run in torch: RMSNorm written out,
rotary embeddings, grouped-query attention by a fused kernel (whose ``a s^2`` scores are never stored, so that term is
gone), no dropout, SwiGLU. Every tensor that autograd keeps is counted once; inputs of frozen products are not kept.

Letters: T tokens of a micro-batch, H hidden size, Q and K widths of queries and keys, k of N experts of width W,
S shared neurons, F neurons of a dense FFN; s bytes of a weight and of the residual stream, c bytes of a product's
result, e bytes within the experts. With autocast each product keeps its own bfloat16 copy of its input.

Omitted, because small or rare: the attention mask of a window shorter than a block, T^2 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...architectures.expert_weighting import routes_attention
from ...models.experts.auto import costs_on, prefers_sorted
from ..recipe import PretrainRecipe
from .shapes import LayerShape, ModelShape

Style = Literal["grouped", "eager", "batched", "sorted", "masked", "split"]
_STYLES: dict[str | None, Style] = {
    None: "grouped",
    "grouped_mm": "grouped",
    "eager": "eager",
    "batched_mm": "batched",
    "llamamoe_auto": "sorted",
    "llamamoe_sorted": "sorted",
    "llamamoe_masked": "masked",
    "llamamoe_grouped_mm": "grouped",
}
"""Implementations of experts, which keep different tensors; ``split`` is the only one of classes that route attention."""


@dataclass(frozen=True)
class Widths:
    """Bytes per number.

    Attributes:
        stored: Bytes of parameters, gradients and moments at rest.
        weights: s, of the weights in computation, their gradients as they appear, and the residual stream.
        compute: c, of the results of products.
        experts: e, within the routed experts.
        casts: Whether autocast copies weights and inputs.
        casts_experts: Whether it also copies the experts' weights; it does not for ``grouped_mm``, transformers'
            default.
    """

    stored: int
    weights: int
    compute: int
    experts: int
    casts: bool
    casts_experts: bool

    @classmethod
    def of(cls, recipe: PretrainRecipe, model_type: str) -> Widths:
        """Return the widths of a recipe. Parameters in bfloat16 are used in bfloat16, whatever ``compute`` is."""
        stored = 4 if recipe.precision.parameters == "float32" else 2
        if recipe.gathers_bfloat16(model_type):
            return cls(stored, 2, 2, 2, False, False)
        compute = 2 if recipe.autocasts else stored
        known = recipe.autocasts and (
            style_of(recipe, model_type) != "grouped" or experts_of(recipe) == "llamamoe_grouped_mm"
        )
        return cls(stored, stored, compute, compute if known else stored, recipe.autocasts, known)


def style_of(recipe: PretrainRecipe, model_type: str) -> Style:
    """Return how the recipe's experts are computed; an unknown implementation counts as ``eager``."""
    if routes_attention(model_type):
        return "split"
    return _STYLES.get(experts_of(recipe), "eager")


def style_for(recipe: PretrainRecipe, model: ModelShape, tokens: int) -> Style:
    """Return how the recipe's experts are computed for a number of tokens, since ``llamamoe_auto`` chooses by sizes."""
    width = max((layer.expert_width for layer in model.layers), default=0)
    style = style_of(recipe, model.model_type)
    if experts_of(recipe) != "llamamoe_auto" or not width or style == "split":
        return style
    costs = costs_on(recipe.device, half=Widths.of(recipe, model.model_type).experts == 2)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    sizes = (model.num_experts, width, model.top_k, model.hidden_size)
    return "sorted" if prefers_sorted(tokens, *sizes, costs=costs, threads=threads) else "masked"


def experts_of(recipe: PretrainRecipe) -> str | None:
    """Return the implementation of the experts, as far as the recipe determines the device."""
    return recipe.experts_on(recipe.device)


@dataclass(frozen=True)
class Pass:
    """A micro-batch, as one device runs it.

    Attributes:
        model: The model.
        widths: Bytes per number.
        tokens: T.
        style: How experts are computed.
        trained: Groups whose weights get a gradient, through an adapter or not.
        ep_size: Ranks that share the experts.
        gate_TN: Float32 arrays ``[T, N]`` that the gate keeps beside the native router's.
        gate_TH: The same of arrays ``[T, H]``.
        mask: Numbers of the attention mask ``[B, T, T]`` that keeps documents apart; 0 without.
    """

    model: ModelShape
    widths: Widths
    tokens: int
    style: Style = "grouped"
    trained: frozenset[str] = frozenset()
    ep_size: int = 1
    gate_TN: int = 0
    gate_TH: int = 0
    mask: int = 0

    @property
    def numbers(self) -> int:
        """Elements of the residual stream, ``T H``."""
        return self.tokens * self.model.hidden_size

    @property
    def rows(self) -> int:
        """Rows of the experts' products: k T, if every expert is equally loaded; N T for ``masked``.

        With expert parallelism the ep different micro-batches of a group are spread over its ep ranks: k T again.
        """
        each = self.model.num_experts if self.style == "masked" else self.model.top_k
        return self.tokens * each

    def norm(self, numbers: int) -> int:
        """Return the bytes of an RMSNorm: the float32 input, and for its weight the normalised input in its dtype."""
        return numbers * (4 + (self.widths.weights if "norms" in self.trained else 0)) + 4 * self.tokens

    def inputs(self, products: Mapping[str, int]) -> int:
        """Return the bytes of one input of products of these groups: kept once, or with autocast a copy for each."""
        count = sum(number for group, number in products.items() if group in self.trained)
        return 2 * self.numbers * count if self.widths.casts else self.numbers * self.widths.weights * (count > 0)


def attention_bytes(layer: LayerShape, run: Pass) -> int:
    """Return ``T [norm + input of q, k, v + (2Q + 2K) c + 4 heads]``, plus ``T (Q + K) (4 + c)`` for q, k norms.

    With a mask each layer turns it into numbers of c bytes, and repeats keys and values for every head: ``4Q``. Routed
    attention always repeats them, and keeps its router's part and ``k (3H + 2K) e``: gathered inputs of queries and
    output, queries as the experts gave them, and outputs before and after they are weighted.
    """
    compute, query, key = run.widths.compute, layer.query_width, layer.key_width
    if layer.routes_attention:
        kept = run.norm(run.numbers) + run.inputs({"attention": 1, "router": 1}) + router_bytes(run)
        kept += run.tokens * (4 * query * compute + 4 * run.model.num_heads) + run.mask * compute
        return kept + run.rows * (3 * run.model.hidden_size + 2 * key) * run.widths.experts
    kept = run.norm(run.numbers) + run.inputs({"attention": 3})
    kept += run.tokens * ((2 * query + 2 * key) * compute + 4 * run.model.num_heads)
    if run.mask:
        kept += run.mask * compute + run.tokens * 2 * (query - key) * compute
    return kept + (run.tokens * (query + key) * (4 + compute) if layer.qk_norm else 0)


def experts_bytes(layer: LayerShape, run: Pass) -> int:
    """Return the bytes of experts, per row in numbers of e bytes ``2H + 4W``.

    These are: gathered input, gate and up, silu(gate), product, output.

    Frozen experts need neither input nor product: ``H + 3W``. ``eager`` and ``split`` keep the weighted output, too: ``H s``.
    ``batched_mm`` keeps a copy of an expert's weights for each row: ``3 H W``. llamamoe's do not gather inputs and
    weight the product instead of the output: ``5W``, and for each token the input's copy. Expert parallelism that
    exchanges tokens keeps what it sends and receives: ``2 H``.
    """
    if not layer.expert_width:
        return 0
    hidden, width, rows, each = run.model.hidden_size, layer.expert_width, run.rows, run.widths.experts
    if run.style in ("sorted", "masked"):
        return rows * 5 * width * each + (run.numbers * each if run.widths.casts else 0)
    kept = rows * (2 * hidden + 4 * width if "experts" in run.trained else hidden + 3 * width) * each
    if run.style in ("eager", "split"):
        kept += rows * hidden * run.widths.weights
    if run.style == "batched":
        kept += rows * 3 * hidden * width * each
    return kept + (2 * rows * hidden * each if run.ep_size > 1 else 0)


def router_bytes(run: Pass) -> int:
    """Return ``T (8 N + 40 k)``, see `ffn_bytes`, and the bytes of the gate."""
    routed = run.tokens * ((8 + 4 * run.gate_TN) * run.model.num_experts + 40 * run.model.top_k)
    return routed + 4 * run.gate_TH * run.numbers


def ffn_bytes(layer: LayerShape, run: Pass) -> int:
    """Return the bytes of the second norm and the FFN.

    Dense: ``T [norm + input of gate, up + 4 F c]``. Mixture: ``T [norm + input of router (and shared gate, up and its
    own gate) + 8 N + 40 k + 4 S c (+ H c with a gate)]`` and `experts_bytes`; 8 N are the router's logits, which the
    losses use, and its probabilities, 40 k its indices and permutations; gates add what they state. Frozen FFNs keep
    3 of the 4.
    """
    tokens, compute = run.tokens, run.widths.compute
    kept = run.norm(run.numbers)
    if layer.dense_width:
        arrays = 4 if "dense_ffn" in run.trained else 3
        kept += run.inputs({"dense_ffn": 2}) + arrays * tokens * layer.dense_width * compute
    if not layer.expert_width:
        return kept
    products = 1 if run.model.model_type == "granitemoeshared" else 2  # one for gate and up together, or one for each
    kept += run.inputs({"router": 2 if layer.shared_gate else 1, "shared": products if layer.shared_width else 0})
    kept += router_bytes(run)
    kept += (4 if "shared" in run.trained else 3) * tokens * layer.shared_width * compute
    kept += run.numbers * compute if layer.shared_gate else 0
    return kept + experts_bytes(layer, run)


def working_bytes(layer: LayerShape, run: Pass) -> int:
    """Return the peak working memory of a layer's backward pass beside the kept tensors.

    The gradient of the residual stream, and the largest of: of the experts three gradients ``[k T, H]`` (put back in
    order, times the outputs, times the weights; two of them are float32), or ``[k T, W]`` with llamamoe's
    implementations; of a dense FFN three ``[T, F]``; of attention three ``[T, Q]`` in float32.
    """
    each = run.widths.experts
    ours = run.style in ("sorted", "masked")
    experts = run.rows * (3 * layer.expert_width * each if ours else run.model.hidden_size * (8 + each))
    dense = 3 * run.tokens * layer.dense_width * run.widths.compute
    attention = 12 * run.tokens * layer.query_width
    return run.numbers * run.widths.weights + max(experts if layer.expert_width else 0, dense, attention)


def adapter_bytes(layer: LayerShape, recipe: PretrainRecipe, run: Pass) -> int:
    """Return the bytes of LoRA: inputs of attention's adapters, and the experts' weights with their adapters added.

    peft computes the sum ``W + scale B A`` of a layer's experts in every forward pass, and the product keeps it.
    """
    if recipe.lora is None:
        return 0
    inputs = sum(shape[1] for name, shape in layer.projections.items() if name in recipe.lora.attention)
    kept = run.tokens * inputs * run.widths.compute if run.widths.casts else run.numbers * run.widths.weights
    if recipe.lora.experts:
        kept += layer.numel.get("experts", 0) * run.widths.weights
    return kept
