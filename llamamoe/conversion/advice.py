"""Warnings of a plan, and remarks that are not reasons to refuse it: costs, widths, other programs."""

from __future__ import annotations

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_layout import MoeLayout, OutTensor
from ..architectures.sources.base import DenseSpec, canonical_shapes
from ..architectures.targets.base import Target
from ..architectures.targets.clients import runs
from ..checkpoint.tokenizer_plan import tokenizer_warnings
from ..words import plural
from .assembly import router_dtype
from .calibration_cost import CalibrationPlan
from .recipe import SplitRecipe
from .sizes import MOST_PADDING, PAD_TO, QUANTISED_BLOCK, round_up

HARD_ROUTER = (
    "the router is hard, so the experts' probabilities nearly tie: programs that choose by float32 probabilities and those "
    "that choose by logits select different experts on 0.02 % (4 of 8) to 0.2 % (24 of 64) of the tokens of a layer, and programs "
    "that round probabilities to bfloat16 on almost all (a soft router or training avoids this)"
)
"""Measured by ``benchmarks/hard_router.py``."""
UNTRAINED = (
    "split without calibration or training: with all experts selected the model equals its parent; with top-k "
    "selection, quality collapses until the model is trained"
)
_MUCH_PADDING = 0.5
"""Zero neurons over the neurons of the experts from which a plan warns."""
BITSANDBYTES = (
    "bitsandbytes leaves the experts unquantised, because transformers 5 stacks them in one parameter; torchao and "
    "llama.cpp quantise them"
)
"""Measured with transformers 5.23."""


def advice(
    spec: DenseSpec,
    recipe: SplitRecipe,
    calibration: CalibrationPlan | None,
    target: Target,
    layout: MoeLayout,
    *,
    text_only: bool = True,
) -> list[str]:
    """Return remarks on a conversion, also on other programs (see `llamamoe.architectures.targets.clients`).

    Args:
        spec: The parent.
        recipe: The recipe.
        calibration: The plan of calibration, if there is one.
        target: The target architecture.
        layout: The sizes.
        text_only: False for a model of images or sound, too, of which no GGUF file can be written.
    """
    found = []
    if not layout.num_experts:
        found.append(
            f"no experts: the {layout.num_shared} neurons kept in each layer are the whole FFN of a dense model; numbers of experts, "
            "router and rescale have no effect"
        )
    if layout.copies > 1:
        found.append("the experts are copies: larger than the parent and no cheaper per token, a start for training")
    elif calibration is None and layout.top_k < layout.num_experts:
        found.append(UNTRAINED)
    if text_only and runs("llama.cpp", target.name):
        found += _unquantised(spec, layout)
    width = layout.expert_width
    padding = layout.padding(spec.intermediate_size)
    if padding and not much_padding(spec, recipe, layout):
        found.append(
            f"the experts of a layer are padded to width {width} with {plural(padding, 'zero neuron')}: exact, and counted in the costs"
        )
    if not layout.combine.any_k:
        found.append(f"the file is correct for top-k = {layout.top_k} only: another k needs another factor")
    if recipe.router_scale == "hard" and layout.top_k < layout.num_experts:
        found.append(HARD_ROUTER)
    if layout.num_experts:
        found.append(BITSANDBYTES)
    return found + target.warnings(spec, layout)


def plan_warnings(
    model: DenseModel, recipe: SplitRecipe, layout: MoeLayout, tensors: tuple[OutTensor, ...], dtype: str
) -> list[str]:
    """Return the warnings of a plan, which ``strict`` turns into refusals."""
    folder = model.checkpoint.path
    found = tokenizer_warnings(folder, model.spec.vocab_size, model.checkpoint.config) if folder.is_dir() else []
    kinds = {model.dtype_of(name) for name in canonical_shapes(model.spec)}
    lossy = sorted(k for k in kinds if k != dtype and dtype != "F32")
    if lossy:
        found.append(f"weights stored as {', '.join(lossy)} are rounded to {dtype}")
    if recipe.router is not None and recipe.router.name == "zeros":
        found.append("the zeros router sends every token to the same experts until it is trained")
    if recipe.rescale is not None and recipe.rescale.name == "llama_moe":
        found.append(
            "the llama_moe rescale is for reproduction: as stored, the output is not exact with any number of experts"
        )
    if router_dtype(tensors, dtype) == "F16" and recipe.router_scale == "hard":
        found.append(
            "float16 cannot hold router rows as small as a hard router needs: weights are equal only to about 1e-2"
        )
    if not layout.combine.bake_is_exact and dtype != "F32" and not recipe.fits:  # refitted weights are rounded once
        found.append(
            f"the factor {layout.combine.bake:g} is not a power of two: the experts' down projections are rounded once more in {dtype} "
            "(--dtype float32, or a number of experts that is a power of two, avoids it)"
        )
    return found + much_padding(model.spec, recipe, layout)


def much_padding(spec: DenseSpec, recipe: SplitRecipe, layout: MoeLayout) -> list[str]:
    """Return a warning with a number of experts that fits, if zero neurons take a large share of the experts."""
    size, padding = spec.intermediate_size, layout.padding(spec.intermediate_size)
    if not padding or padding < _MUCH_PADDING * layout.copies * size:
        return []
    block = recipe.pad_to or PAD_TO
    near = _fitting_experts(size, layout.num_shared, layout.num_experts // max(1, layout.copies) - 1, block)
    ways = [f"--experts {near[0]} has width {near[1]} and hardly any"] if near else []
    ways += [f"a --pad-to smaller than {block}"] if block > PAD_TO else []
    way = f" ({', or '.join(ways)})" if ways else ""
    return [
        f"{padding:,} zero neurons per layer pad the {layout.num_experts:,} experts to width {layout.expert_width}, "
        f"{100 * padding / size:.0f} % of the FFN's {size:,}: they are stored and computed{way}"
    ]


def _unquantised(spec: DenseSpec, layout: MoeLayout) -> list[str]:
    """Name the matrices that llama.cpp cannot quantise, or not to the requested type, and the remedy."""
    width, shared = layout.expert_width, layout.shared_width
    found = []
    if layout.num_experts and width % QUANTISED_BLOCK:
        parts = layout.num_experts // layout.copies
        near = _fitting_experts(spec.intermediate_size, layout.num_shared, parts - 1, QUANTISED_BLOCK)
        other = f"; {near[0]} experts of {near[1]} can be quantised" if near else ""
        found.append(
            f"llama.cpp keeps ffn_down_exps in F16 at expert width {width}, which is not a multiple of {QUANTISED_BLOCK} "
            f"(--pad-to {QUANTISED_BLOCK}{other})"
        )
    elif layout.num_experts and width % 256:
        wide = round_up(width, 256)
        cheap = layout.num_experts * (wide - width) < MOST_PADDING * spec.intermediate_size
        way = "--pad-to 256 avoids it" if cheap else "nothing to mend: the file is larger and no less exact"
        found.append(
            f"llama.cpp's k-quants take larger types (q5_0 to q8_0) for ffn_down_exps at expert width {width}, which is not a "
            f"multiple of 256 ({way})"
        )
    if layout.num_experts and shared % QUANTISED_BLOCK:
        found.append(
            f"llama.cpp keeps ffn_down_shexp in F16 at {shared} shared neurons, which is not a multiple of {QUANTISED_BLOCK}"
        )
    return found


def _fitting_experts(size: int, shared: int, most: int, block: int) -> tuple[int, int] | None:
    """Return the largest number of experts up to ``most`` that pads little to a multiple of ``block``, and the width."""
    for count in range(most, 1, -1):
        width = round_up(-(-(size - shared) // count), block)
        if (count * width + shared) / size - 1 < MOST_PADDING:
            return count, width
    return None
