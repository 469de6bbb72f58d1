"""The cluster, a workload, and an undisturbed run of it, each made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import workload
from helpers.slurm_cluster import Cluster, missing_program, processes_with, tail, wait_for

PATIENCE = 400.0  # seconds for whatever takes a few on an idle machine


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = missing_program()
    if missing:
        pytest.skip(f"Slurm is not installed (no {missing}); see tests/slurm/install.sh")
    with Cluster() as running:
        yield running


@dataclass
class Pretraining:
    """The pre-training template, scaled down to one CPU task on each of some nodes."""

    cluster: Cluster
    folder: Path
    configuration: Path

    def submit(
        self, run: str, *overrides: str, nodes: int = 2, preflight: bool = False, **site: str
    ) -> str:
        """Submit the template; `site` are further variables around it. The job id."""
        return self.cluster.submit(
            f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
            "--time=30", f"--output={self.folder}/{run}.log",
            "slurm/pretrain_internimage_h.sbatch", *overrides,
            environment={
                "M3I_CONFIG": str(self.configuration), "M3I_RUN": run,
                "M3I_FOLDER": str(self.folder), "M3I_DEVICE": "cpu",
                "M3I_PREFLIGHT": "yes" if preflight else "no", "M3I_PYTHON": sys.executable, **site,
            },
        )  # fmt: skip

    def wait_step(self, run: str, step: int) -> None:
        """Wait until so many steps are done."""
        self.wait(lambda: workload.steps_done(self.folder / run) >= step, f"{run} at step {step}")

    def wait(self, condition, what: str) -> None:
        """Wait for a condition; fails with everything there is to know."""
        wait_for(condition, PATIENCE, what, self.report)

    def finish(self, job: str, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the end of a job, which must be this one; what Slurm says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        self.wait(lambda: self.cluster.job(job)["JobState"] in over, f"the end of job {job}")
        found = self.cluster.job(job)
        assert found["JobState"] == state, self.report()
        return found

    def nodes(self, job: str) -> list[str]:
        """Names of a running job's nodes."""
        compact = self.cluster.job(job)["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", compact).split()

    def attempts_begun(self, run: str, count: int) -> list[int]:
        """Wait until so many attempts have begun; the step that each of them started from."""
        path = self.folder / run / "logs" / "attempts"

        def steps() -> list[int]:
            lines = path.read_text().splitlines() if path.exists() else []
            return [int(line.split()[2]) for line in lines]

        self.wait(lambda: len(steps()) >= count, f"attempt {count} of {run}")
        return steps()

    def rank(self, job: str, rank: int) -> int:
        """Process id of a rank in the first step; srun and the batch script are in none."""
        here = f"SLURM_CONF={self.cluster.environment['SLURM_CONF']}"  # other tests, other clusters
        variables = (here, f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0", f"SLURM_PROCID={rank}")
        (pid,) = processes_with(*variables, command="train.py")
        return pid

    def log(self, run: str) -> str:
        """What the batch script has said."""
        return (self.folder / f"{run}.log").read_text()

    def report(self) -> str:
        """Ends of the logs of all runs, and the cluster's."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*/logs/latest/*.log")]
        return "\n".join([*(f"--- {path}\n{tail(path)}" for path in logs), self.cluster.report()])


@pytest.fixture(scope="session")
def pretraining(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Pretraining:
    folder = tmp_path_factory.mktemp("pretraining")
    return Pretraining(cluster, folder, workload.write_workload(folder))


@pytest.fixture(scope="session")
def undisturbed(pretraining: Pretraining) -> dict[int, dict[str, float]]:
    """The loss curve of a run on two nodes that nothing happened to."""
    # Left over from a launcher in the submitting shell; the job must not take them for its own.
    stale = {"RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    job = pretraining.finish(pretraining.submit("undisturbed", **stale))
    assert job["Restarts"] == "0"
    return workload.curve(pretraining.folder / "undisturbed")
