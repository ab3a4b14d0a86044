"""Slurm's commands for tests: every job runs at once, on this machine, with the environment that a real one would have."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SBATCH = r"""#!/usr/bin/env bash
# sbatch [OPTIONS] SCRIPT [ARGUMENTS]: all tasks of its array, one after another
set -euo pipefail
while [[ ${1:-} == -* ]]; do shift; done
script=$1; shift
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
cpus=$(sed -n 's/^#SBATCH --cpus-per-task=\([0-9]*\).*/\1/p' "$script")
export SLURM_JOB_ID=17 SLURM_JOB_NODELIST=localhost SLURM_NODELIST=localhost SLURM_JOB_NUM_NODES=1 SLURM_GPUS_ON_NODE=2
export SLURM_CPUS_PER_TASK=${cpus:-1}
for task in $(seq 0 "${last:-0}"); do
    if [[ -n $last ]]; then export SLURM_ARRAY_TASK_ID=$task; fi
    bash "$script" "$@" >>"$SLURM_TEST_LOG" 2>&1
done
echo "Submitted batch job 17"
"""
SRUN = r"""#!/usr/bin/env bash
echo "srun $*" >>"$SLURM_TEST_LOG"
while [[ ${1:-} == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\necho localhost\n"


def environment(folder: Path) -> dict[str, str]:
    """Environment variables with which Slurm's commands are found; ``folder/slurm.log`` gets what jobs print."""
    commands = folder / "slurm"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join((str(commands), str(Path(sys.executable).parent), os.environ["PATH"]))
    return {"PATH": path, "SLURM_TEST_LOG": str(folder / "slurm.log"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
