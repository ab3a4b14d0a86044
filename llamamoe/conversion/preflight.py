"""Plan a conversion with its calibration text, and check the free disk space, before `split` writes anything."""

from __future__ import annotations

from pathlib import Path

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.out_folder import check_room
from ..models.devices import check_device
from .calibration_cost import most_tokens
from .plan import SplitPlan, plan_split
from .recipe import AUTO, SplitRecipe
from .rest import rest_bytes


def planned(model: DenseModel, recipe: SplitRecipe) -> SplitPlan:
    """Plan a conversion and find the files of its calibration text, without opening them.

    The costs of calibration are those of the text if it is smaller than what the recipe asks for: a token has a byte.

    Raises:
        RefusedError: The conversion is not possible; the message names every reason.
        UsageError: The device cannot be available, a path or glob matches nothing, a folder holds no text, or a file is of an
            unknown kind.
    """
    plan = plan_split(model, recipe)
    if plan.calibration:
        check_device(recipe.device)
    if not plan.calibration or AUTO in plan.recipe.calibration:
        return plan
    most = most_tokens(plan.recipe.calibration)
    return plan if most >= plan.recipe.calibration_tokens else plan_split(model, recipe, text_tokens=most)


def check_disk(out: Path, plan: SplitPlan, *, reuse: bool) -> None:
    """Refuse if the disk cannot hold the result; see `llamamoe.checkpoint.out_folder.check_room`.

    Raises:
        RefusedError: Too few bytes are free.
    """
    states = plan.calibration.disk_bytes if plan.calibration else 0
    states += plan.alignment.state_bytes if plan.alignment else 0
    check_room(
        out,
        plan.cost.nbytes + rest_bytes(plan.model) + states,
        reuse=reuse,
        what="the result and the hidden states take" if states else "the result takes",
        less=("fewer --calibration-tokens", "a smaller --dtype") if states else ("a smaller --dtype",),
    )
