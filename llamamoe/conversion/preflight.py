"""Plan a conversion with its calibration text, and check the free disk space, before `split` writes anything."""

from __future__ import annotations

from pathlib import Path

from ..architectures.dense_checkpoint import DenseModel
from ..checkpoint.out_folder import free_bytes
from ..errors import RefusedError
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


def check_room(out: Path, plan: SplitPlan, *, resume: bool) -> None:
    """Refuse if the disk cannot hold the result.

    Raises:
        RefusedError: Too few bytes are free.
    """
    have = free_bytes(out, resume=resume)
    states = plan.calibration.disk_bytes if plan.calibration else 0
    states += plan.alignment.state_bytes if plan.alignment else 0
    need = plan.cost.nbytes + rest_bytes(plan.model) + states + 64 * 2**20
    if have < need:
        raise RefusedError(
            f"the result{' and the hidden states' if states else ''} take{'' if states else 's'} {need / 1e9:.2f} GB, but the disk of {out} has {have / 1e9:.2f} GB free.",
            hint=f"Free some space, choose another disk, {'fewer --calibration-tokens ' if states else ''}or a smaller --dtype.",
        )
