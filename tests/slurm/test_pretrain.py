"""The pre-training template on a cluster that is unkind to it: the loss curve must not notice."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from cluster import kill
from workload import STEPS, curve

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

MIDDLE = 6  # between the checkpoints of steps 4 and 8

# An interpreter that finds a place where nobody can write, on one node, instead of the run folder.
BAD_NODE = """#!/bin/bash
for argument; do
    shift
    [[ $SLURMD_NODENAME == {node} && $argument == {folder} ]] && argument=/dev/null/run
    set -- "$@" "$argument"
done
exec {python} "$@"
"""


def begin(pretraining, run: str, **options) -> str:
    """Start a run and wait until it is in the middle."""
    job = pretraining.submit(run, **options)
    pretraining.wait_step(run, MIDDLE)
    return job


def require_same_curve(pretraining, run: str, job: str, undisturbed) -> None:
    """The job has finished after one restart that went on from a checkpoint, with this curve."""
    assert pretraining.finish(job)["Restarts"] == "1"
    first, second = pretraining.attempts(run)
    assert first == 0
    assert second >= 4
    assert curve(pretraining.folder / run) == undisturbed


def test_two_nodes_to_the_end(pretraining, undisturbed):
    assert sorted(undisturbed) == list(range(STEPS))
    folder = pretraining.folder / "undisturbed"
    assert (folder / "logs" / "latest" / "rank-0001.log").exists()
    assert (folder / "checkpoints" / f"step-{STEPS:08d}" / "complete.json").exists()
    assert f"finished at step {STEPS}" in pretraining.log("undisturbed")


def test_signal_saves_and_requeues(pretraining, undisturbed):
    job = begin(pretraining, "signal")
    pretraining.cluster.run("scancel", "--signal=USR1", job)
    require_same_curve(pretraining, "signal", job, undisturbed)
    assert pretraining.attempts("signal")[1] >= MIDDLE  # saved there, not at a multiple of 4 before
    assert "was asked to stop and has saved" in pretraining.log("signal")


def test_requeue_from_outside(pretraining, undisturbed):
    job = begin(pretraining, "requeue")
    pretraining.cluster.run("scontrol", "requeue", job)
    require_same_curve(pretraining, "requeue", job, undisturbed)
    assert pretraining.attempts("requeue")[1] >= MIDDLE


def test_preemption(pretraining, undisturbed):
    job = begin(pretraining, "preempted")
    urgent = pretraining.cluster.submit(
        "--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null",
        "--wrap=sleep 1",
    )  # fmt: skip
    require_same_curve(pretraining, "preempted", job, undisturbed)
    assert pretraining.cluster.job(urgent)["JobState"] == "COMPLETED"
    assert pretraining.attempts("preempted")[1] >= MIDDLE


def test_killed_rank(pretraining, undisturbed):
    job = begin(pretraining, "killed-rank")
    os.kill(pretraining.rank(job, 1), signal.SIGKILL)
    require_same_curve(pretraining, "killed-rank", job, undisturbed)
    assert "task 1: Killed" in pretraining.log("killed-rank")


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_slurmd(pretraining, undisturbed, rank):
    """A node freezes: its slurmd is gone and its rank stands still, until Slurm gives it up.

    The node of rank 0 is also that of the batch script, which survives the attempt it belongs to.
    """
    run, cluster = f"killed-slurmd-{rank}", pretraining.cluster
    job = begin(pretraining, run)
    node, frozen = pretraining.nodes(job)[rank], pretraining.rank(job, rank)
    cluster.kill_node(node)
    os.kill(frozen, signal.SIGSTOP)
    try:
        pretraining.wait(lambda: len(pretraining.attempts(run)) == 2, "the restart")
        os.kill(frozen, signal.SIGCONT)  # the rank of the lost attempt comes back, too late
        assert node not in pretraining.nodes(job)
        require_same_curve(pretraining, run, job, undisturbed)
        if rank == 0:
            pretraining.wait(
                lambda: "Slurm has already ended this attempt" in pretraining.log(run), "the script"
            )
            assert pretraining.cluster.job(job)["Restarts"] == "1"
    finally:
        kill(frozen)
        cluster.start_node(node)
        cluster.wait_idle()


def test_preflight_excludes_the_bad_node(pretraining, tmp_path):
    """On n2 the run folder cannot be written; the job leaves it for n3 and trains."""
    python = tmp_path / "python"
    folder = pretraining.folder / "excluding"
    python.write_text(BAD_NODE.format(node="n2", folder=folder, python=sys.executable))
    python.chmod(0o755)
    job = pretraining.submit(
        "excluding", "optimizer.length=3 steps", preflight=True, M3I_PYTHON=str(python)
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
    assert pretraining.attempts("broken") == [0, 0, 0]
    assert "gives up: 2 restarts in a row without a new checkpoint" in pretraining.log("broken")


def test_resume_on_one_node(pretraining, undisturbed):
    job = begin(pretraining, "one-node")
    pretraining.cluster.run("scancel", "--signal=USR1", job)
    pretraining.cluster.wait_state(job, "PENDING", 120)
    pretraining.cluster.run("scancel", job)
    pretraining.finish(pretraining.submit("one-node", nodes=1))
    found = curve(pretraining.folder / "one-node")
    assert found.keys() == undisturbed.keys()
    for step, values in undisturbed.items():
        # The spread of features is measured within a rank's part of the batch.
        whole = {name: value for name, value in values.items() if not name.startswith("spread")}
        part = {name: found[step][name] for name in whole}
        assert part == pytest.approx(whole, rel=2e-5, abs=1e-6), step
