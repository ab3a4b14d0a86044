"""Check the calibration text and the free disk space before `split` writes anything."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.out_folder import free_bytes
from ..data.files import find_files
from ..errors import RefusedError
from .plan import SplitPlan
from .recipe import AUTO


def check_text(plan: SplitPlan) -> None:
    """Find the files of the calibration text before anything is written, without opening them.

    Raises:
        UsageError: A path or glob matches nothing, a folder holds no text, or a file is of an unknown kind.
    """
    if plan.calibration and AUTO not in plan.recipe.calibration:
        find_files(plan.recipe.calibration)


def check_room(out: Path, plan: SplitPlan, *, resume: bool) -> None:
    """Refuse if the disk cannot hold the result.

    Raises:
        RefusedError: Too few bytes are free.
    """
    have = free_bytes(out, resume=resume)
    states = plan.calibration.disk_bytes if plan.calibration else 0
    states += plan.alignment.state_bytes if plan.alignment else 0
    need = plan.cost.nbytes + states + 64 * 2**20
    if have < need:
        raise RefusedError(
            f"the result{' and the hidden states' if states else ''} take{'' if states else 's'} {need / 1e9:.2f} GB, but the disk of {out} has {have / 1e9:.2f} GB free.",
            hint=f"Free some space, choose another disk, {'fewer --calibration-tokens ' if states else ''}or a smaller --dtype.",
        )
