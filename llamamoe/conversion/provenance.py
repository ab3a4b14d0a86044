"""Record the origin of a checkpoint in its ``config.json``, and the fingerprint that a resume must match."""

from __future__ import annotations

from typing import Any

from .._version import __version__
from ..checkpoint.ledger import fingerprint_of
from ..checkpoint.locate import Location
from ..lazy import torch
from .plan import SplitPlan


def config_block(plan: SplitPlan, location: Location) -> dict[str, Any]:
    """Return the value of ``config.json["llamamoe"]``: the same for every run of the same conversion."""
    layout, recipe, routed = plan.layout, plan.recipe, plan.target.routed
    return {
        "version": __version__,
        "source": location.name,
        "source_revision": location.revision,
        "method": recipe.method.name,
        "router": recipe.router.name if recipe.router and routed else None,
        "router_scale": recipe.router_scale if routed else None,
        "rescale": recipe.rescale.name if recipe.rescale and routed else None,
        "repair": recipe.repair.name if recipe.repair and plan.repaired else None,
        "recipe_sha256": recipe.sha256(),
        "num_experts": layout.num_experts,
        "top_k": layout.top_k,
        "expert_width": layout.expert_width,
        "shared_neurons": layout.num_shared,
        "factor": layout.combine.factor,
        "baked_factor": layout.combine.bake,
        "parity": plan.parity,
        "exactness": plan.exactness,
    }


def plan_fingerprint(plan: SplitPlan, compute: dict[str, Any] | None = None) -> str:
    """Return a fingerprint that changes whenever a resumed run would write other bytes.

    Args:
        plan: The plan of the output.
        compute: Device and dtype of calibration; None without it.
    """
    return fingerprint_of(
        {
            "version of llamamoe": __version__,
            "version of torch": torch.__version__,
            "number of threads": torch.get_num_threads(),
            "source": [plan.model.checkpoint.fingerprint(), plan.config],
            "recipe": plan.recipe.model_dump(mode="json"),
            "device or dtype": [compute],
        }
    )
