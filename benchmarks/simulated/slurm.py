"""A stand-in for Slurm around the real template: it starts, requeues and gives up as that says.

`slurm/pretrain_vit_b16.sbatch` and `common.sh` run as they are, in bash; what they call, `srun` and
`scontrol`, are small programs here. So the decisions (which exit code is requeued, which ends the
job, when restarts without progress give up) are those of the product.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from simulated.trace import QUEUE_MINUTES, SCALE

ROOT = Path(__file__).resolve().parents[2]
REQUEUED = 85  # exit code of the template

SCONTROL = """#!/bin/bash
cd "$SIMULATED_SLURM" || exit 1
case "$1 $2" in
    "show hostnames") echo "$SLURM_JOB_NODELIST" ;;
    "show node") echo " NodeAddr=127.0.0.1 " ;;
    "show job") echo " JobState=$(cat state) Restarts=$SLURM_RESTART_COUNT" \\
        "SubmitTime=$(cat submitted) ExcNodeList=(null) " ;;
    requeue*) : ;;
esac
"""


class Job:
    """One submission: attempts of the same job until it has finished.

    Args:
        folder: for what the stand-in keeps.
        runs: folder of all runs.
        configuration: a YAML file.
        run: name of the run.
        ranks: tasks of the job, on one node.
    """

    def __init__(self, folder: Path, runs: Path, configuration: Path, run: str, ranks: int) -> None:
        self.restart = -1
        self.run = runs / run
        self.log = folder / f"{run}.log"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        python, program = shlex.quote(sys.executable), shlex.quote(str(ROOT / SRUN))
        self._program("scontrol", SCONTROL)
        self._program("srun", f'#!/bin/bash\nexec {python} -S -E {program} "$@"\n')
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "M3I_"))}
        self._environment = clean | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}", "SIMULATED_SLURM": str(folder),
            "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": socket.gethostname(),
            "SLURM_NTASKS": str(ranks), "SLURM_SUBMIT_DIR": str(ROOT),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1", "M3I_PYTHON": sys.executable, "M3I_PREFLIGHT": "no",
            "M3I_DEVICE": "cpu", "M3I_CONFIG": str(configuration), "M3I_FOLDER": str(runs),
            "M3I_RUN": run,
        }  # fmt: skip

    def start(self) -> None:
        """Begin the next attempt, out of the queue."""
        self.restart += 1
        (self._folder / "tasks.json").unlink(missing_ok=True)
        self.mark("RUNNING")
        (self._folder / "submitted").write_text(time.strftime("%Y-%m-%dT%H:%M:%S"))
        if self.restart:
            time.sleep(QUEUE_MINUTES / SCALE)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", "slurm/pretrain_vit_b16.sbatch"],
                env=self._environment | {"SLURM_RESTART_COUNT": str(self.restart)},
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def mark(self, state: str) -> None:
        """What `scontrol show job` says from now on."""
        (self._folder / "state").write_text(state)

    @property
    def code(self) -> int | None:
        """Exit code of the attempt; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def tasks(self) -> list[int]:
        """Process ids of the ranks; empty before they are started."""
        return self._noted()[1:]

    def launcher(self) -> int:
        """Process id of srun."""
        return self._noted()[0]

    def end(self) -> None:
        """End whatever still runs."""
        if self._process is None or self.code is not None:
            return
        for pid in self.tasks():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _noted(self) -> list[int]:
        try:
            return json.loads((self._folder / "tasks.json").read_text())
        except FileNotFoundError:
            return []

    def _program(self, name: str, text: str) -> None:
        path = self._folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)


SRUN = Path("benchmarks") / "simulated" / "srun.py"
