"""A sweep as a Slurm job array: one task for each cell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from m3i_scale.engine.stop import STOPPED
from m3i_scale.sweep.spec import Sweep

TEMPLATE = """#!/bin/bash
# The {cells} runs of the sweep {name}, written by `m3i sweep {file} --slurm`. Submit from {here}:
#
#   sbatch {script}
#
# Options before the script override the lines below; your cluster's partition, account and GPU go
# there. A task that was stopped by a signal has saved, and puts itself back into the queue; what is
# finished is passed over, so submitting again after a failure runs only what is missing.
#SBATCH --job-name=m3i-{name}
#SBATCH --array={array}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output={logs}/slurm-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
trap '' TERM  # the run saves when it gets this; the script must live to see it

cd {here} || exit 1
srun --ntasks=1 {python} -m m3i_scale.cli sweep {arguments} --only "$SLURM_ARRAY_TASK_ID"
code=$?
if (( code == {stopped} )); then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def write_script(sweep: Sweep, file: str, overrides: Sequence[str], indexes: Sequence[int]) -> Path:
    """Write the array script into the sweep's folder, for the cells with these indexes."""
    logs = sweep.own_folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = sweep.own_folder / "sweep.sbatch"
    here = Path.cwd()
    path.write_text(
        TEMPLATE.format(
            cells=len(indexes),
            name=sweep.name,
            file=file,
            script=shlex.quote(str(path)),
            array=ranges(indexes),
            logs=logs.absolute(),
            here=shlex.quote(str(here)),
            python=shlex.quote(sys.executable),
            arguments=shlex.join([file, *overrides]),
            stopped=STOPPED,
        )
    )
    return path


def ranges(numbers: Sequence[int]) -> str:
    """As Slurm writes sets of numbers: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
