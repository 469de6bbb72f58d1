"""The pre-training template on a cluster that is unkind to it: the loss curve must not notice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import pytest

from helpers.workload import STEPS, curve, steps_done

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(1200)]

# Figures of collapse, measured within a rank's part of the batch.
WITHIN_A_RANK = ("spread", "rank", "mask_token_use", "student", "constant")

# An interpreter that finds a place where nobody can write, on one node, instead of the run folder.
BAD_NODE = """#!/bin/bash
for argument; do
    shift
    [[ $SLURMD_NODENAME == {node} && $argument == {folder} ]] && argument=/dev/null/run
    set -- "$@" "$argument"
done
exec {python} "$@"
"""


def test_two_nodes_to_the_end(pretraining, undisturbed):
    assert sorted(undisturbed) == list(range(STEPS))
    folder = pretraining.folder / "undisturbed"
    assert (folder / "logs" / "latest" / "rank-0001.log").exists()
    assert (folder / "checkpoints" / f"step-{STEPS:08d}" / "complete.json").exists()
    assert f"finished at step {STEPS}" in pretraining.log("undisturbed")


def test_a_run_is_evaluated(pretraining, undisturbed, tmp_path):
    folder = pretraining.folder
    run = folder / "undisturbed"
    job = pretraining.cluster.submit(
        "--nodes=1", "--cpus-per-task=1", "--mem=1G", "--time=10", "--gpus-per-node=1",
        f"--output={tmp_path}/log", "slurm/evaluate.sbatch", "--run", str(run),
        "--gallery", f"{folder}/category.parquet", "--queries", f"{folder}/heldout.parquet",
        "--no-pictures", environment={"M3I_PYTHON": sys.executable, "M3I_DEVICE": "cpu"},
    )  # fmt: skip
    pretraining.finish(job)
    assert json.loads((run / "eval.json").read_text())["step"] == max(undisturbed) + 1


def signalled(pretraining, job: str) -> None:
    pretraining.cluster.run("scancel", "--signal=USR1", job)


def requeued(pretraining, job: str) -> None:
    pretraining.cluster.run("scontrol", "requeue", job)


def preempted(pretraining, job: str) -> None:
    pretraining.cluster.submit(
        "--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null",
        "--wrap=sleep 1",
    )  # fmt: skip


def robbed_of_a_rank(pretraining, job: str) -> None:
    os.kill(pretraining.rank(job, 1), signal.SIGKILL)


def test_a_night_of_interruptions(pretraining, undisturbed):
    """One after the other; the curve is the same.

    Preemption, signal, requeue, a killed rank, and last a frozen node: its slurmd gone and its rank
    standing still until Slurm gives it up. It is the node of rank 0, where the batch script
    survives the attempt that it belongs to, and must leave the job alone.
    """
    run, cluster = "night", pretraining.cluster
    job = pretraining.submit(run)
    for number, disturb in enumerate((preempted, signalled, requeued, robbed_of_a_rank), start=1):
        reached = one_step_further(pretraining, run, number)
        disturb(pretraining, job)
        begun = pretraining.attempts_begun(run, number + 1)
        if disturb is not robbed_of_a_rank:  # all steps done are saved, wherever the job stood
            assert begun[-1] >= reached
            assert pretraining.log(run).count("was asked to stop and has saved") == number
    assert "task 1: Killed" in pretraining.log(run)
    one_step_further(pretraining, run, 5)
    node, frozen = pretraining.nodes(job)[0], pretraining.rank(job, 0)
    cluster.kill_node(node)
    os.kill(frozen, signal.SIGSTOP)
    begun = pretraining.attempts_begun(run, 6)
    assert begun[-1] >= begun[-2]
    assert node not in pretraining.nodes(job)
    os.kill(frozen, signal.SIGCONT)  # the rank of the lost attempt comes back, too late
    cluster.start_node(node)
    pretraining.wait(
        lambda: "restart 4] Slurm has already ended this attempt" in pretraining.log(run),
        "the script of the lost attempt",
    )
    assert pretraining.finish(job)["Restarts"] == "5"
    assert curve(pretraining.folder / run) == undisturbed
    cluster.wait_idle()


def one_step_further(pretraining, run: str, attempt: int) -> int:
    """Wait until an attempt has begun and made a new step; the number of steps done by then.

    A killed attempt may have made a step that is in no checkpoint, and in the metrics already.
    """
    begun = pretraining.attempts_begun(run, attempt)[-1]
    reached = max(begun, steps_done(pretraining.folder / run)) + 1
    pretraining.wait_step(run, reached)
    return reached


def test_resume_on_one_node(pretraining, undisturbed):
    """A checkpoint of two nodes goes on on one; but for rounding the curve is the same."""
    before, run = pretraining.folder / "undisturbed", pretraining.folder / "one-node"
    middle = f"step-{STEPS - 8:08d}"
    shutil.copytree(before / "checkpoints" / middle, run / "checkpoints" / middle)
    pretraining.finish(pretraining.submit("one-node", nodes=1))
    found = curve(run)
    assert sorted(found) == list(range(STEPS - 8, STEPS))
    for step in found:
        names = [name for name in undisturbed[step] if not name.startswith(WITHIN_A_RANK)]
        whole = {name: float(undisturbed[step][name]) for name in names}
        part = {name: float(found[step][name]) for name in names}
        assert part == pytest.approx(whole, rel=2e-5, abs=1e-6, nan_ok=True), step


def test_preflight_excludes_the_bad_node(pretraining, tmp_path):
    """On n2 the run folder cannot be written; the job leaves it for n3 and trains."""
    python = tmp_path / "python"
    folder = pretraining.folder / "excluding"
    python.write_text(BAD_NODE.format(node="n2", folder=folder, python=sys.executable))
    python.chmod(0o755)
    job = pretraining.submit(
        "excluding", "optimizer.duration=3 steps", preflight=True, M3I_PYTHON=str(python)
    )
    found = pretraining.finish(job)
    assert (found["Restarts"], found["ExcNodeList"]) == ("1", "n2")
    assert "n2: rank 1: " in pretraining.log("excluding")
    assert "will not run on n2 again" in pretraining.log("excluding")
    assert sorted(curve(folder)) == [0, 1, 2]


def test_user_error_is_not_tried_again(pretraining):
    job = pretraining.submit("mistake", "optimizer.no_such_key=1")
    found = pretraining.finish(job, state="FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0")
    assert "unknown key 'optimizer.no_such_key'" in pretraining.log("mistake")


def test_gives_up_when_restarts_bring_no_progress(pretraining):
    job = pretraining.submit("broken", M3I_PYTHON="/bin/false", M3I_MAX_STUCK="2")
    found = pretraining.finish(job, state="FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("2", "1:0")
    assert pretraining.attempts_begun("broken", 3) == [0, 0, 0]
    assert "gives up: 2 restarts in a row without a new checkpoint" in pretraining.log("broken")
