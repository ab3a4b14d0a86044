"""The plan of a conversion, for people."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import TYPE_CHECKING

from llamamoe.calibration.compute import FAST_FLOPS, REFERENCE_FLOPS

from ._format import amount, change, duration, plural, size
from ._tables import bullets, facts, heading, paragraph, table
from ._text import bold, echo

if TYPE_CHECKING:
    from llamamoe.alignment.cost import AlignmentPlan
    from llamamoe.architectures.costs import Cost
    from llamamoe.architectures.moe_layout import MoeLayout
    from llamamoe.conversion.calibration_cost import CalibrationPlan
    from llamamoe.conversion.plan import SplitPlan


def print_plan(plan: SplitPlan, source: str, *, verify: bool, verbose: bool) -> None:
    """Print the plan for ``--dry-run``."""
    from llamamoe.conversion.verify import verification_seconds

    echo(bold(f"{source}: {plan.model.source.name} -> {plan.target.name}"))
    checked = [
        (
            "verification",
            f"about {duration(verification_seconds(plan))} more: all weights and both models' outputs are compared",
        )
    ]
    facts([*_conversion(plan), *(checked if verify else [])])
    heading("Costs")
    costs(plan.parent_cost, plan.cost)
    _speed(plan)
    if plan.repaired and plan.layout.top_k < plan.layout.num_experts:
        heading("Quality")
        paragraph(_QUALITY)
    if verbose:
        _details(plan)
    print_warnings(plan.warnings)
    print_advice(plan.advice)
    echo("\nNothing was written.")


_QUALITY = (
    "It is not foretold: it depends on model and text. For orientation, SmolLM2-135M with half of its FFN active had 1.6 to 1.7 times its "
    "parent's perplexity on web text after 65,536 tokens of calibration, and 2.1 times and more after 8,192; with three quarters active 1.2 times. "
    "`llamamoe evaluate OUT --against SOURCE --text HELD_OUT_TEXT` measures this model."
)
"""BENCHMARKS.md: "SmolLM2-135M, beside measured speed", the recovery study's starts, and "Calibrated conversion: quality"."""
_TOO_SMALL = (
    "The FFNs of this model are {:.0f} times smaller, so that calling experts takes a larger part of the time: expect less, or "
    "none: SmolLM2-135M decodes 1.0 to 1.2 times as fast as its parent in llama.cpp, and 0.9 to 1.3 times in transformers with llamamoe_auto. "
    "`llamamoe bench OUT --against SOURCE --experts llamamoe_auto` measures this model."
)


def _speed(plan: SplitPlan) -> None:
    """Print expected speeds with the measurement that they come from, or that there is none."""
    from llamamoe.conversion.expected_speed import expected_speed

    found = expected_speed(plan.layout, plan.model.spec, plan.target.name)
    measured = found["measured"]
    smaller = max((each["times_smaller"] or 0.0 for each in measured), default=0.0)
    if smaller:
        heading(
            f"Speed of a {measured[0]['model']} model of the nearest measured shape, relative to its parent (not of this model)"
        )
    else:
        heading("Expected speed, relative to the parent, at the nearest shape that was measured")
    rows, origins = [], []
    for near in measured:
        for key, who in (("over_dense", near["shape"]), ("static_over_dense", "static pruning")):
            tasks = near[key]
            rows += [(near["program"], who, *(_over(values) for values in tasks.values()))] if tasks else []
        origins.append(f"{near['program']}: {near['origin']}")
    if rows:
        table(("", "measured", *measured[0]["over_dense"]), rows, right=range(2, len(rows[0])), wrap=(1,))
        bullets(origins)
        if smaller:
            paragraph(_TOO_SMALL.format(smaller))
    else:
        paragraph("There is no measurement of a similar shape; `llamamoe compare --speed` makes one.")
    if found["batches"]:
        counts = ", ".join(f"{each['tokens']}: {each['experts_touched']:.1f}" for each in found["batches"])
        paragraph(
            f"Experts used by a batch, of {plan.layout.num_experts}, if all are selected equally often: {counts}. From "
            f"{found['no_gain_from_batch']} sequences on, a decoding step reads the whole FFN, as in the parent, so it cannot be "
            "faster where reading weights is the bottleneck."
        )


def _over(values: Sequence[float]) -> str:
    ratio, lowest, highest = values
    return f"{ratio:.2f} x ({lowest:.2f}-{highest:.2f})"


def _conversion(plan: SplitPlan) -> list[tuple[str, str]]:
    from llamamoe.transforms.llama_cpp import runs_planned

    layout, recipe, router = plan.layout, plan.recipe, plan.recipe.router
    assert router is not None, "the plan resolves it"
    in_llama_cpp = "; llama.cpp (llamamoe export-gguf)" if runs_planned(plan) else ""
    return [
        *_sizes(plan),
        *_fitting(plan),
        *([("kept dense", ", ".join(map(str, layout.dense_layers)))] if layout.dense_layers else []),
        ("method", recipe.method.name),
        ("exactness", plan.exactness),
        *([("router", f"{router.name}, {recipe.router_scale}"), ("scaling", _scaling(plan))] if layout.top_k else []),
        ("loads in", f"transformers {' and '.join(plan.majors)}{in_llama_cpp}"),
        ("to write", f"{size(plan.cost.nbytes)} of {recipe.dtype} in {plural(len(plan.shards), 'file')}"),
        ("peak memory", peak_memory(plan.peak_bytes)),
    ]


def peak_memory(nbytes: int) -> str:
    """The tensors of a conversion, and what else its process takes."""
    return f"about {size(nbytes)} of tensors; with Python, torch, mapped files and freed memory about twice as much"


def expert_width(layout: MoeLayout, padding: int) -> str:
    """The neurons of an expert, and how many zero neurons (``padding``) the experts of a layer have in all."""
    added = (
        f"; the {layout.num_experts} experts of a layer have {plural(padding, 'zero neuron')} in all" if padding else ""
    )
    return f"{layout.expert_width:,} neurons{added}"


def _sizes(plan: SplitPlan) -> list[tuple[str, str]]:
    """Return the sizes of the parent, and of experts and shared neurons."""
    spec, layout, recipe = plan.model.spec, plan.layout, plan.recipe
    padding = plan.padding_per_layer
    rows = [
        ("layers", f"{spec.num_layers}, hidden size {spec.hidden_size:,}, FFN of {spec.intermediate_size:,} neurons"),
        ("FFN active", ffn_active(plan)),
    ]
    if plan.target.routed:
        rows += [
            ("experts", f"{layout.num_experts} per layer, {layout.top_k} selected per token"),
            ("expert width", expert_width(layout, padding)),
        ]
    if plan.target.attention_experts:
        heads = f"{layout.top_k} of {layout.num_experts} query heads of each key/value head for each token"
        rows.append(("attention", heads))
    if layout.num_shared:
        assert recipe.shared_by is not None, "the plan resolves it"
        by = recipe.shared_by.name
        padded = f", stored as {layout.shared_width:,}" if layout.shared_width != layout.num_shared else ""
        rows.append(("shared", f"{layout.num_shared:,} neurons for every token, chosen by {by}{padded}"))
    elif layout.shared_width:
        rows.append(("shared", f"none; {plan.target.name} needs a shared expert, so a zero one is stored"))
    return rows


def _fitting(plan: SplitPlan) -> list[tuple[str, str]]:
    """Return what is fitted to text, and the cost of that."""
    recipe, rows = plan.recipe, []
    if plan.repaired and recipe.repair is not None:
        passes = "" if recipe.repair_passes == 1 else f", {recipe.repair_passes} passes"
        rows.append(("repair", f"{recipe.repair.name}{passes}"))
    if plan.calibration is not None:
        if plan.sampling_bytes:
            rows.append(("sampled text", _sampled(plan)))
        rows += calibration_rows(plan.calibration, recipe.calibration_tokens)
    if plan.alignment is not None:
        rows += _alignment(plan.alignment)
    return rows


def _scaling(plan: SplitPlan) -> str:
    """Return what a selected expert counts, and the factor that makes up for the router's weights."""
    from llamamoe.architectures.moe_layout import weight

    layout, rescale = plan.layout, plan.recipe.rescale
    assert rescale is not None, "the plan resolves it"
    combine = layout.combine
    given = weight(combine.weighting, layout.num_experts, layout.top_k)
    counts = combine.factor * given
    times = "as much as" if isclose(counts, 1.0) else f"{counts:.4g} times as much as"
    text = f"rescale {rescale.name}: a selected expert counts {times} in the dense FFN"
    if combine.factor == 1.0:
        return text
    place = "config.json" if combine.bake == 1.0 else "the experts' down projections"
    return f"{text}; a factor of {combine.factor:.4g} in {place} makes up for router weights of about 1/{1 / given:.0f} each"


def _sampled(plan: SplitPlan) -> str:
    return f"the parent writes it first, token by token, with all of its weights in memory ({size(plan.sampling_bytes)} at most)"


def calibration_rows(needed: CalibrationPlan, wanted: int) -> list[tuple[str, str]]:
    """The text, the files and the time of calibration; ``wanted`` is the recipe's number of tokens."""
    tokens = f"{needed.tokens:,} tokens"
    if needed.tokens <= wanted - needed.length:
        tokens = f"at most {tokens} (a token has a byte; the recipe allows {wanted:,})"
    return [
        ("calibration", f"{tokens} in sequences of {needed.length:,}"),
        ("text needed by", ", ".join(needed.needing)),
        ("hidden states", f"{size(needed.disk_bytes)} in memory-mapped files beside OUT while it runs"),
        ("calibration time", _time(needed)),
    ]  # fmt: skip


def _time(needed: CalibrationPlan | AlignmentPlan) -> str:
    """The time on two cores: a plan measures nothing, and imports no torch."""
    least, most = (duration(needed.seconds(rate)) for rate in (FAST_FLOPS, REFERENCE_FLOPS))
    return f"about {least} (two fast cores, bfloat16) to {most} (slow ones): {amount(needed.flops)} operations. The run says at its start how long it takes"


def _alignment(needed: AlignmentPlan) -> list[tuple[str, str]]:
    options = needed.options
    what = {"frozen": "", "scales": " and neurons' factors", "ffn": " and FFN weights"}[options.weights]
    return [
        ("alignment", f"{options.tokens:,} tokens, {options.batch:,} a step: assignment, router{what} of all layers together"),
        ("alignment time", _time(needed)),
    ]  # fmt: skip


def ffn_active(plan: SplitPlan) -> str:
    """The neurons of a converted layer that a token uses, and their share of the FFN's."""
    layout, whole = plan.layout, plan.model.spec.intermediate_size
    used, padding = layout.active_real(whole), layout.active_padding(whole)
    text = f"{used:,} of {whole:,} neurons for each token ({100 * used / whole:.0f} %)"
    return text + (f", and {plural(padding, 'zero neuron')} of padding" if padding else "")


def costs(before: Cost, after: Cost) -> None:
    """Print what the dense model and the mixture cost."""
    rows = [
        ("parameters", before.total_parameters, after.total_parameters, amount),
        ("active per token", before.active_parameters, after.active_parameters, amount),
        ("FLOPs per token", before.flops_per_token, after.flops_per_token, amount),
        ("bytes", before.nbytes, after.nbytes, size),
    ]
    table(("", "dense", "MoE", "change"), [(n, f(b), f(a), change(b, a)) for n, b, a, f in rows], right=(1, 2, 3))


def _details(plan: SplitPlan) -> None:
    """Print the details of ``-v``: parts, files, recipe."""
    heading("Parameters by part")
    before, after = plan.parent_cost.total, plan.cost
    parts = dict.fromkeys([*before, *after.total])
    rows = [
        (p.replace("_", " "), f"{before.get(p, 0):,}", f"{after.total.get(p, 0):,}", f"{after.active.get(p, 0):,}")
        for p in parts
    ]
    table(("", "dense", "MoE", "active"), rows, right=(1, 2, 3))
    heading("Files")
    table(("", ""), [(f, size(sum(n for *_, n in t.values()))) for f, t in plan.shards.items()], right=(1,))
    heading("Recipe")
    echo("".join(f"  {line}\n" for line in plan.recipe.to_yaml().splitlines()), nl=False)


def print_warnings(warnings: Sequence[str], *, err: bool = False) -> None:
    """Warnings, or nothing if there are none."""
    if warnings:
        heading("Warnings", err=err)
        bullets(warnings, mark="!", err=err)


def print_advice(advice: Sequence[str]) -> None:
    """Print notes, or nothing if there are none."""
    if advice:
        heading("Notes")
        bullets(advice)
