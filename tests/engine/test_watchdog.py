from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.ranks import start_ranks, wait_all
from helpers.training import open_small
from m3i_scale.cluster.launch import World
from m3i_scale.engine import loop, metrics
from m3i_scale.engine.stop import StopFlag
from m3i_scale.engine.watchdog import STALLED, Watchdog


def test_a_beating_process_lives(tmp_path: Path):
    dog = Watchdog(tmp_path, 0, 0.5)
    for _ in range(10):
        time.sleep(0.1)
        dog.beat()
    dog.stop()
    assert not list(tmp_path.iterdir())


def test_a_stalled_process_writes_its_stacks_and_ends(tmp_path: Path):
    script = (
        "import time, pathlib\nfrom m3i_scale.engine.watchdog import Watchdog\n"
        f"Watchdog(pathlib.Path({str(tmp_path)!r}), 3, 0.4)\n"
        "def stuck_here():\n    time.sleep(60)\nstuck_here()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == STALLED
    assert "rank 3 has made no step for 0.4 s" in done.stderr
    assert "stuck_here" in (tmp_path / "stacks-rank-00003.txt").read_text()


def stall_on_rank_1(world: World, folder: Path) -> None:
    """Train; rank 1 falls asleep in step 2."""
    run = open_small(world, folder, {"engine.stall_minutes": 0.1})
    original = run.sharded.engine.step

    def step() -> None:
        if world.rank == 1 and run.progress.step == 2:
            time.sleep(100)
        original()

    run.sharded.engine.step = step
    record = metrics.MetricLog(run.folder, is_main=world.is_main, total=6, first=0)
    loop.train_to_end(run, StopFlag(), record)


@pytest.mark.distributed
def test_one_sleeping_rank_ends_all_and_every_rank_tells_where_it_stood(tmp_path: Path):
    processes = start_ranks(2, stall_on_rank_1, tmp_path)
    outputs = wait_all(processes, 120)
    assert [p.returncode for p in processes] == [STALLED, STALLED], outputs
    stacks = [(tmp_path / "small" / f"stacks-rank-0000{r}.txt").read_text() for r in range(2)]
    assert "time.sleep" not in stacks[0]
    assert "line" in stacks[0]
    assert "in step" in stacks[1]
    # Which collective each is in: rank 0 waits for the other in the update's first.
    assert "rank 0: it is in all_reduce of " in stacks[0]
    assert re.search(r"number \d+, begun \d+\.\d s ago", stacks[0])
    assert "rank 1: it is in no collective; the last one was " in stacks[1]
    assert "it is in all_reduce" in outputs[0]
