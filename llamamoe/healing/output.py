"""Write the files beside healed weights: configuration, recipe, card and receipt; and check OUT."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..architectures.config_compat import addable_keys
from ..architectures.expert_weighting import rescaled_block
from ..checkpoint.files import copy_file, write_text
from ..checkpoint.ledger import check_left, partial_path
from ..checkpoint.out_folder import HEAL_RECIPE_FILE, RECIPE_FILE, check_out, check_room
from ..checkpoint.reader import INDEX
from ..checkpoint.readme import read_card
from ..checkpoint.receipts import DOCUMENT_HASHES, documents_fitted_to
from ..checkpoint.tokenizer import CarriedFiles
from ..conversion.advice import UNTRAINED
from ..models.loadable import check_loads
from .plan import HealPlan, config_of, factors_of


def check_place(out: Path, plan: HealPlan, *, resume: bool, force: bool, processes: int = 1) -> None:
    """Refuse an OUT that would harm existing files, or for which there is no room.

    Each of several processes has hidden states of its own, and all but the first keep their layers in files until the end.

    Raises:
        RefusedError: See `llamamoe.checkpoint.out_folder.check_out`; with ``force`` a checkpoint by llamamoe may be
            replaced.
    """
    for name, source in (("MODEL", plan.model.path), ("--parent", plan.parent.path)):
        check_out(out, source, force=force, name=name)
    check_left(partial_path(out), resume=resume, restart=force)
    states = 2 * plan.state_bytes * processes if plan.states_in_files else 0
    handed = plan.nbytes * (processes - 1) // processes
    fewer = ("fewer --tokens", *(["fewer processes"] if processes > 1 else []))
    check_room(out, plan.nbytes + handed + states, reuse=True, less=fewer)


def write_side_files(plan: HealPlan, folder: Path, receipt: Mapping[str, Any], carried: CarriedFiles) -> None:
    """Write everything but weights and receipt."""
    if (plan.checkpoint.path / INDEX).is_file():
        copy_file(plan.checkpoint.path / INDEX, folder / INDEX)
    write_text(folder / "config.json", json.dumps(healed_config(plan, receipt), indent=2, ensure_ascii=False) + "\n")
    carried.write(folder)
    check_loads(folder)
    write_text(folder / HEAL_RECIPE_FILE, plan.recipe.to_yaml())
    write_text(folder / "README.md", healed_card(plan, receipt))


def healed_config(plan: HealPlan, receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Return MODEL's configuration with both spellings of rope, the router's change if any, and its origin."""
    config = plan.checkpoint.config | config_of(plan, renormalised=receipt["renormalised"])
    config |= addable_keys(config)
    block = rescaled_block(config.get("llamamoe") or {}, **factors_of(plan, renormalised=receipt["renormalised"]))
    if "exactness" in block:
        block |= {"parity": "none", "exactness": "not exact: layers were distilled from the parent's"}
    kept = sum(layer["kept"] for layer in receipt["layers"])
    if kept and plan.recipe.router == "trained" and "router_scale" in block:
        block["router_scale"] = "soft"
    healed = {
        "version": __version__,
        "parent": plan.parent.name,
        "recipe_sha256": plan.recipe.sha256(),
        "tokens": receipt["tokens"]["trained"],
        "layers": kept,
    }
    block["healed"] = [*block.get("healed", []), healed]
    return config | {"llamamoe": block}


def healed_card(plan: HealPlan, receipt: Mapping[str, Any]) -> str:
    """Return MODEL's card without its claim of exactness, and with a section about the healing."""
    card = read_card(plan.checkpoint.path).rstrip() or f"# {plan.model.name}"
    card = re.sub(
        r"(?ms)^## Is it the same model\?\n.*?(?=^## |\Z)",
        "## Is it the same model?\n\nNo: its layers were distilled from the parent's after the conversion, see Healed.\n\n",
        card,
    )
    card = card.replace(f"--recipe {RECIPE_FILE}`, with", "--recipe RECIPE.yaml`, with RECIPE.yaml")
    if any(layer["kept"] for layer in receipt["layers"]):
        card = re.sub(r"(?m)^## Good to know\n+(?=## |\Z)", "", card.replace(f"- {UNTRAINED}\n", ""))
    errors = receipt["error"]
    rows = [
        f"| {layer['layer']} | {_number(layer['error_before'])} | {_number(layer['error_after'])} | "
        f"{'' if layer['kept'] else 'unchanged'} |"
        for layer in receipt["layers"]
    ]
    return "\n".join([
        card.rstrip(),
        "",
        "## Healed",
        "",
        f"`llamamoe heal MODEL OUT --parent PARENT --recipe {HEAL_RECIPE_FILE}`",
        "",
        f"llamamoe {__version__} trained the FFN of every converted layer on the outputs of the dense parent "
        f"`{plan.parent.name}` for the same inputs, {receipt['tokens']['trained']:,} tokens of text, "
        f"{plan.recipe.epochs} times each; routers were {plan.recipe.router}. "
        f"Error of the layers on {receipt['tokens']['held_out']:,} held-out tokens, relative to the parent's outputs: "
        f"{_number(errors['before'])} before, {_number(errors['after'])} after (mean).",
        "",
        "| layer | before | after | |",
        "|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def make_receipt(
    plan: HealPlan,
    *,
    layers: list[dict[str, Any]],
    text: Mapping[str, Any],
    computed: Mapping[str, Any],
    renormalised: bool,
    weights_sha256: str,
    warnings: tuple[str, ...],
) -> dict[str, Any]:
    """Return the content of ``llamamoe_heal.json`` without facts that differ between runs."""
    sequences, length = text["sequences"], text["length"]
    held_out = plan.held_out_of(sequences) * length
    pairs = [
        (layer["error_before"], layer["error_after"] if layer["kept"] else layer["error_before"]) for layer in layers
    ]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    means = [sum(pair[i] for pair in known) / len(known) if known else None for i in range(2)]
    return {
        "llamamoe": __version__,
        "model": plan.model.name,
        "converted": plan.checkpoint.config.get("llamamoe"),
        "parent": {"name": plan.parent.name, "revision": plan.parent.revision},
        "plan": {key: value for key, value in plan.to_json().items() if key not in ("model", "parent", "warnings")},
        "tokens": {"trained": sequences * length - held_out, "held_out": held_out},
        "text": text,
        DOCUMENT_HASHES: documents_fitted_to(plan.checkpoint.path),
        "computed": computed,
        "renormalised": renormalised,
        "error": {"before": means[0], "after": means[1]},
        "layers": layers,
        "weights_sha256": weights_sha256,
        "warnings": list(warnings),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")},
    }
