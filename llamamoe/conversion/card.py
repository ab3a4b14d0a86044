"""Write the model card of a converted checkpoint: description, costs, origin and licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from .._version import __version__
from ..checkpoint.locate import Location
from ..checkpoint.readme import HUB_ID, INHERITED, USE, parent_metadata
from ..checkpoint.text_part import OF_SOUND
from ..words import plural
from .plan import SplitPlan
from .recipe import SplitRecipe

Inputs = Literal["text", "image", "sound"]
_PIPELINES: dict[Inputs, str] = {
    "text": "text-generation",
    "image": "image-text-to-text",
    "sound": "audio-text-to-text",
}
_LOADERS: dict[Inputs, str] = {"image": "ImageTextToText", "sound": "MultimodalLM"}


def _inputs(plan: SplitPlan) -> Inputs:
    """Return what a model takes: text, or something beside it."""
    part = plan.model.part
    if part is None:
        return "text"
    return "sound" if part.whole["model_type"] in OF_SOUND else "image"


def _metadata(plan: SplitPlan, location: Location) -> dict[str, Any]:
    parent = parent_metadata(location.path) if location.path.is_dir() else {}
    config_name = str(plan.model.checkpoint.config.get("_name_or_path", ""))
    base = next((n for n in (location.name, config_name) if HUB_ID.fullmatch(n)), None)
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _PIPELINES[_inputs(plan)],
    }
    data["tags"] = ["moe", "llamamoe", plan.target.name] if plan.target.routed else ["llamamoe"]
    data |= {key: parent[key] for key in INHERITED if key in parent}
    if base:
        data["base_model"] = base
    return data


def _cost_table(plan: SplitPlan) -> str:
    parent, cost = plan.parent_cost, plan.cost
    rows = ["| | parent | this model |", "|---|---|---|"]
    neurons = plan.model.spec.intermediate_size
    used = plan.layout.active_real(neurons)
    rows.append(f"| neurons of an FFN per token | {neurons:,} | {used:,} ({100 * used / neurons:.0f} %) |")
    rows.append(f"| parameters | {parent.total_parameters:,} | {cost.total_parameters:,} |")
    rows.append(f"| active per token | {parent.active_parameters:,} | {cost.active_parameters:,} |")
    rows.append(
        f"| FLOPs per token, attention scores left out | {parent.flops_per_token:,} | {cost.flops_per_token:,} |"
    )
    rows.append(f"| bytes | {parent.nbytes:,} | {cost.nbytes:,} |")
    return "\n".join(rows)


def _exactness(plan: SplitPlan) -> str:
    layout = plan.layout
    if not plan.splitter.exact:
        return (
            "No: the method drops, repeats or renews neurons, and no selection of experts reproduces the parent's outputs."
            if plan.target.routed
            else f"No: {layout.num_shared} of the parent's {plan.model.spec.intermediate_size} neurons per layer are left."
        )
    where = f"{layout.copies} experts" if layout.copies > 1 else "exactly one place"
    if plan.fitted:
        return (
            "No, on purpose: weights were refitted on text, so that the selected experts approximate the whole FFN. Every neuron "
            f"of the parent is in {where}. The model is {plan.exactness}."
        )
    if layout.copies > 1:
        return f"Every neuron of the parent is in {where}, and the model is {plan.exactness}."
    text = f"Every neuron of the parent is in {where}, so the model is {plan.exactness}."
    if layout.top_k < layout.num_experts:
        text += (
            f" With the configured {plural(layout.top_k, 'expert')} per token it computes a different function, "
            "with poor quality until it is trained."
        )
    return text


def _shown(recipe: SplitRecipe) -> SplitRecipe:
    """Return the recipe for the card, which is published: texts by name, without the folders of this machine."""
    return recipe.model_copy(update={"calibration": tuple(Path(each).name for each in recipe.calibration)})


def _made(plan: SplitPlan) -> str:
    """Describe the conversion of each FFN."""
    layout, size = plan.layout, plan.model.spec.intermediate_size
    if not plan.target.routed:
        return f"{layout.num_shared} of the {size} neurons of each FFN were kept; nothing is routed"
    how = "was copied into" if layout.copies > 1 else "was split into"
    beside = f", beside {layout.num_shared} shared neurons" if layout.num_shared else ""
    if plan.target.attention_experts:
        beside += f"; attention was split into {layout.num_experts} experts, too, of one query head per key/value head"
    return (
        f"each FFN of {size} neurons {how} {layout.num_experts} experts of width {layout.expert_width}, "
        f"{layout.top_k} of them selected per token{beside}"
    )


def model_card(plan: SplitPlan, location: Location, files: list[str], warnings: tuple[str, ...]) -> str:
    """Return the README.md of the output, the same bytes for every run of the same conversion."""
    licence = "license" in _metadata(plan, location) or any(f.startswith("LICENSE") for f in files)
    parts = [
        "---\n" + yaml.safe_dump(_metadata(plan, location), sort_keys=False).strip() + "\n---",
        f"# {location.name} {'as a mixture of experts' if plan.target.routed else 'with fewer neurons'}",
        f"Made by llamamoe {__version__} from `{location.name}`"
        + (f" at revision `{location.revision}`" if location.revision else "")
        + f": {_made(plan)}. Architecture: `{plan.config['architectures'][0]}` of transformers, no remote code.",
        USE.replace("AutoTokenizer", "AutoProcessor").replace("CausalLM", _LOADERS[_inputs(plan)])
        if plan.model.part
        else USE,
        "## Is it the same model?\n\n" + _exactness(plan),
        "## What it costs\n\n" + _cost_table(plan),
        "## How it was made\n\n`llamamoe split SOURCE OUT --recipe llamamoe_recipe.yaml`, with\n\n```yaml\n"
        + _shown(plan.recipe).to_yaml()
        + "```",
    ]
    remarks = [*warnings, *plan.advice]
    if remarks:
        parts.append("## Good to know\n\n" + "\n".join(f"- {r}" for r in remarks))
    parts.append(
        "## Licence\n\n"
        + (
            "The parent's licence applies."
            if licence
            else "The parent's licence applies; its files do not name one: look it up before use."
        )
    )
    return "\n\n".join(parts) + "\n"
