"""The check of the nodes before training: who is blamed for what."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import free_port, start_program, wait_all
from m3i_scale.cluster import known_answers, node_check, node_state
from m3i_scale.cluster.node_check import Check, Limits, Report, judge, nodes_to_exclude, rounds

NODES = ["a", "b", "c", "d"]


def healthy(ranks: int = 8) -> dict[int, Report]:
    """Reports of two ranks on each of four nodes."""
    seconds = {"pairs 0": 0.010, "pairs 1": 0.011, "all": 0.020}
    return {rank: Report([], 1e9 + 0.01 * rank, dict(seconds)) for rank in range(ranks)}


def verdict(reports: dict[int, Report]) -> dict[str, list[str]]:
    return judge(reports, NODES, 2, Limits())


def test_healthy_nodes_are_not_blamed():
    assert verdict(healthy()) == {}


def test_own_problems_and_silence_are_laid_at_the_nodes_door():
    reports = healthy()
    reports[2].problems = ["no GPU for local rank 0, PyTorch sees 0"]
    del reports[7]
    assert verdict(reports) == {
        "b": ["rank 2: no GPU for local rank 0, PyTorch sees 0"],
        "d": ["rank 7 did not report"],
    }


def test_clock_that_is_off_is_told_by_how_much():
    reports = healthy()
    reports[5].clock -= 60
    (reason,) = verdict(reports)["c"]
    assert "rank 5: the clock is off by -60.0 s" in reason


def test_one_failing_pair_is_nobodys_fault_two_are():
    reports = healthy()
    for rank in (0, 1, 2, 3):  # the pair (a, b)
        reports[rank].seconds["pairs 0"] = math.inf
    assert verdict(reports) == {}
    for rank in (2, 3, 4, 5):  # the pair (b, c)
        reports[rank].seconds["pairs 1"] = math.inf
    assert list(verdict(reports)) == ["b"]


def test_slow_node_is_told_by_its_better_pair():
    reports = healthy()
    for rank in (4, 5):
        reports[rank].seconds |= {"pairs 0": 0.1, "pairs 1": 0.09}
    reports[0].seconds["pairs 0"] = 0.5
    (reason,) = verdict(reports)["c"]
    assert "0.090 s, usual here are 0.010 s" in reason


def test_unfinished_rounds_do_not_blame_the_partner_of_a_dead_rank():
    reports = healthy()
    for rank in (0, 1, 2):  # rank 3, of the pair (a, b), died
        reports[rank].seconds = {"pairs 0": math.inf}
    del reports[3]
    assert list(verdict(reports)) == ["b"]


def test_failure_of_all_together_names_no_node():
    reports = healthy()
    reports[1].seconds["all"] = math.inf
    blame = verdict(reports)
    assert list(blame) == [""]
    assert nodes_to_exclude(blame, NODES) == []


def test_nodes_are_left_out_unless_all_are_bad():
    assert nodes_to_exclude({"b": ["x"], "d": ["y"]}, NODES) == ["b", "d"]
    assert nodes_to_exclude({node: ["disk full"] for node in NODES}, NODES) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 64])
def test_rounds_pair_every_node_with_two_others(count):
    found = rounds(count)
    assert found.pop("all") == [tuple(range(count))]
    assert len(found) <= 3
    for groups in found.values():
        members = [node for group in groups for node in group]
        assert len(members) == len(set(members)), "a node is in two groups at once"
    pairs = {frozenset(group) for groups in found.values() for group in groups}
    times = Counter(node for pair in pairs for node in pair)
    assert times == (dict.fromkeys(range(count), 2) if count > 2 else {})


def test_slow_device_is_told_by_what_it_takes_longer_for():
    reports = healthy()
    for rank, report in reports.items():
        report.speeds = {"a matrix product": 0.001 * (1.02**rank), "a copy": 0.002}
    assert judge(reports, NODES, 2, Limits(slow_device=1.5)) == {}
    reports[3].speeds["a copy"] = 0.004
    (reason,) = judge(reports, NODES, 2, Limits(slow_device=1.5))["b"]
    assert reason == "rank 3: a copy takes 4 ms, usual here are 2 ms"


def test_products_are_compared_with_known_answers(monkeypatch):
    cpu = torch.device("cpu")
    problem, seconds = known_answers.compute(cpu)
    assert problem is None
    assert 0 < seconds < math.inf
    assert 0 < known_answers.memory(cpu) < math.inf
    timed = known_answers._timed

    def flipped(work, device):
        seconds, product = timed(work, device)
        product[17, 5] += 1
        return seconds, product

    monkeypatch.setattr(known_answers, "_timed", flipped)
    assert "multiplies wrongly: 1 rows of a float32 product differ" in (
        known_answers.compute(cpu)[0] or ""
    )


def test_no_sum_of_the_known_products_is_too_large_for_bf16():
    """Of the size that GPUs multiply; the draw is always the same."""
    size = known_answers.SIZE["cuda"]
    a, b, _, vector = known_answers._problem(size, torch.float32)
    assert float((a @ b[:, :256]).abs().max()) < 256
    assert bool((vector > 0).all())


def test_disk_that_cannot_be_written_is_told(tmp_path):
    assert node_state.disk_problem(tmp_path / "run", "a") is None
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    assert "Not a directory" in (node_state.disk_problem(tmp_path / "file" / "run", "a") or "")


def test_missing_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert node_state.gpu_problem(2, 0.9) == "no GPU for local rank 2, PyTorch sees 2"


def run_as_threads(folder: Path, timeout: float) -> dict[int, Report]:
    """Four nodes of two ranks, as threads on one store; the reports that rank 0 has."""
    store, results = dist.HashStore(), {}

    def work(rank: int) -> None:
        cpu, limits = torch.device("cpu"), Limits()
        check = Check(rank, rank % 2, NODES, 2, cpu, folder, timeout, limits)
        results[rank] = check.run(store)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 8, "a rank waits for one that hangs"
    return results[0]


def test_node_whose_network_fails_is_found(tmp_path, monkeypatch):
    """Four nodes as threads on one store; every all-reduce with node c fails."""

    def all_reduce_seconds(store, rank, size, device, timeout):
        if "2" in store.prefix or size == 8:
            raise RuntimeError("connection reset")
        return 0.01

    class Prefix:
        def __init__(self, prefix, store):
            self.prefix = prefix.split("(")[1]

    monkeypatch.setattr(node_check, "all_reduce_seconds", all_reduce_seconds)
    monkeypatch.setattr(dist, "PrefixStore", Prefix)
    blame = verdict(run_as_threads(tmp_path, timeout=20))
    assert nodes_to_exclude(blame, NODES) == ["c"]
    assert blame["c"] == ["no all-reduce with either neighbour succeeds"]


def test_a_pair_whose_communicator_is_never_made_is_named_in_time(tmp_path, monkeypatch):
    never = threading.Event()

    def all_reduce_seconds(store, rank, size, device, timeout):
        if "(1, 2)" in store.prefix:
            never.wait(60)  # as NCCL: whatever its own timeout says
        return 0.01

    class Prefix:
        def __init__(self, prefix, store):
            self.prefix = prefix

    monkeypatch.setattr(node_check, "all_reduce_seconds", all_reduce_seconds)
    monkeypatch.setattr(dist, "PrefixStore", Prefix)
    began = time.monotonic()
    blame = verdict(run_as_threads(tmp_path, timeout=1))
    assert time.monotonic() - began < 15
    assert any(thread.name == node_check.LEFT_BEHIND for thread in threading.enumerate())
    never.set()
    assert nodes_to_exclude(blame, NODES) == ["b", "c"]
    assert "rank 2: the all-reduce of b, c did not end within 2 s" in blame["b"]


def test_errors_within_a_time_are_raised():
    def work() -> float:
        raise RuntimeError("connection reset")

    with pytest.raises(RuntimeError, match="connection reset"):
        node_check.within(10, work)
    assert node_check.within(10, lambda: 0.5) == 0.5


def test_too_little_shared_memory_is_told_with_what_helps(tmp_path):
    assert node_state.shared_memory_problem(1e3, tmp_path) is None
    told = node_state.shared_memory_problem(1e18, tmp_path) or ""
    assert "MiB free and data workers need" in told
    assert "--shm-size" in told
    assert "data workers" in (node_state.shared_memory_problem(1, tmp_path / "none") or "")


def test_the_first_rank_of_a_node_looks_at_shared_memory_for_all(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(node_check, "shared_memory_problem", lambda size: asked.append(size))
    for rank in (0, 1):
        cpu = torch.device("cpu")
        check = Check(rank, rank, ["a"], 2, cpu, tmp_path, 5, Limits(), shared_memory=1e8)
        assert check._own_problems() == []
    assert asked == [2e8]


def start(folders: list[Path], bad: Path, present: int) -> list[tuple[int | None, str]]:
    """Run the program, one rank on each of as many nodes as there are folders; codes and outputs.

    As a process that a job starts, with the imports, it runs in tests/slurm/test_pretrain.py.
    """
    variables = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0",
        "WORLD_SIZE": str(len(folders)),
    }  # fmt: skip
    running = []
    for rank, folder in enumerate(folders[:present]):
        words = [
            "--folder", str(folder), "--nodes", ",".join(NODES[: len(folders)]),
            "--bad-nodes", str(bad), "--device", "cpu", "--slow-factor", "1000",
            "--timeout", "60" if present == len(folders) else "15", "--shared-memory", "1",
        ]  # fmt: skip
        output = bad.with_name(f"output-{rank}")
        where = variables | {"RANK": str(rank)}
        running.append(start_program("m3i_scale.cluster.node_check", words, output, **where))
    outputs = wait_all(running, 150)
    return [(rank.returncode, said) for rank, said in zip(running, outputs, strict=True)]


@pytest.mark.distributed
def test_three_good_nodes(tmp_path):
    done = start([tmp_path] * 3, tmp_path / "bad", present=3)
    assert [code for code, _ in done] == [0, 0, 0], done
    assert "3 nodes, 3 ranks: all is well" in done[0][1]
    assert (tmp_path / "bad").read_text() == ""


@pytest.mark.distributed
def test_unwritable_folder_and_absent_rank_name_their_nodes(tmp_path):
    (tmp_path / "file").touch()
    folders = [tmp_path, tmp_path / "file" / "run", tmp_path]
    code, said = start(folders, tmp_path / "bad", present=2)[0]
    assert code == 1
    assert (tmp_path / "bad").read_text() == "b\nc\n"
    assert "Not a directory" in said
    assert "c: rank 2 did not report" in said
