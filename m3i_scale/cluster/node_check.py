"""Check the nodes of a job before it trains, and name those that are to blame.

    srun python -m m3i_scale.cluster.node_check --folder runs/h --nodes n1,n2,n3 --bad-nodes FILE

1. Each rank looks at itself: GPU present and free; products with known answers; file written,
   synced, read; room in /dev/shm, through which data workers hand over their batches. How fast the
   device multiplies and copies within its memory is compared with the median of all ranks.
2. Rank 0 releases all ranks at once, and each notes what its clock says.
3. Neighbouring nodes all-reduce in pairs, (n1, n2), (n2, n3), (n3, n1), at most three rounds for
   any number of nodes; in the end all together. A node both of whose pairs fail, or are slow, is to
   blame; one failing pair is a link between two good nodes.

An all-reduce has a limit that includes making its communicator, for which NCCL itself waits without
end: where it is passed the check ends, and both nodes of the pair are named.

Ranks report through a TCP store on rank 0, so that one that never came, or hangs, is told by its
silence. When every node has a problem none is named: the cause is a shared one.

Exit code 0: all is well. 1: it is not; the reasons are printed, the names of the nodes to leave out
(none, where no single node is to blame) are in FILE, one a line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from m3i_scale.cluster import known_answers
from m3i_scale.cluster.launch import rank_variables
from m3i_scale.cluster.node_state import disk_problem, gpu_problem, shared_memory_problem

ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # float32 that are all-reduced
REPEATS = 5
LEFT_BEHIND = "m3i: within a time"  # name of threads


@dataclass
class Report:
    """What one rank found."""

    problems: list[str] = field(default_factory=list)
    clock: float = 0.0  # seconds since 1970 when rank 0 released all ranks
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # of an all-reduce, by round; inf: failed
    speeds: dict[str, float] = field(default_factory=dict)  # seconds, by what was done


@dataclass(frozen=True)
class Limits:
    """What a good node keeps within."""

    clock_skew: float = 5.0  # seconds from the median of all ranks
    slow_factor: float = 5.0  # times the median all-reduce of all nodes
    free_memory: float = 0.9  # of the GPU's
    slow_device: float = 10.0  # times the median product, and copy in memory, of all ranks


def rounds(nodes: int) -> dict[str, list[tuple[int, ...]]]:
    """Groups of node indices that all-reduce at the same time, by name of the round.

    Every node is in two of the ring's pairs; two rounds hold all pairs, three if their number is
    odd. Two nodes or one have the round of all only.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    if nodes > 2:
        for first in range(nodes):
            odd_one = nodes % 2 == 1 and first == nodes - 1
            name = f"pairs {2 if odd_one else first % 2}"
            found.setdefault(name, []).append((first, (first + 1) % nodes))
    return {**found, "all": [tuple(range(nodes))]}


def all_reduce_seconds(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta
) -> float:
    """Seconds of the fastest of some all-reduces in a group of its own.

    Raises:
        RuntimeError: it failed, took longer than `timeout`, or its result is wrong.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        best = math.inf
        for _ in range(REPEATS):
            values = torch.ones(ELEMENTS[device.type], device=device)
            started = time.perf_counter()
            dist.all_reduce(values)
            right = bool((values == size).all())
            best = min(best, time.perf_counter() - started)
            if not right:
                raise RuntimeError("an all-reduce gave wrong sums")
        return best
    finally:
        dist.destroy_process_group()


class NotEndedError(RuntimeError):
    """Something did not end within its time and was left behind in a thread."""


def within(seconds: float, work: Callable[[], float]) -> float:
    """The result of `work`, which runs in a thread, because a call that hangs cannot be ended.

    Raises:
        NotEndedError: it did not end in time; the thread goes on, and the process can only `_exit`.
        RuntimeError: what `work` raised.
    """
    results: list[float] = []
    errors: list[RuntimeError] = []

    def run() -> None:
        try:
            results.append(work())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=LEFT_BEHIND, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NotEndedError(f"did not end within {seconds:.0f} s")
    return results[0]


# ------------------------------------------------------------------------------------- of all ranks


def judge(
    reports: dict[int, Report], nodes: Sequence[str], ranks_per_node: int, limits: Limits
) -> dict[str, list[str]]:
    """Node -> what is wrong with it; under "" what cannot be laid at one node's door."""
    blame: dict[str, list[str]] = {}
    for rank in range(len(nodes) * ranks_per_node):
        node = nodes[rank // ranks_per_node]
        if rank not in reports:
            blame.setdefault(node, []).append(f"rank {rank} did not report")
        elif reports[rank].problems:
            blame.setdefault(node, []).append(f"rank {rank}: {'; '.join(reports[rank].problems)}")
    for rank, offset in _clock_offsets(reports).items():
        if abs(offset) > limits.clock_skew:
            reason = f"rank {rank}: the clock is off by {offset:+.1f} s"
            blame.setdefault(nodes[rank // ranks_per_node], []).append(reason)
    speeds = {rank: report.speeds for rank, report in reports.items()}
    for rank, reason in known_answers.slow(speeds, limits.slow_device):
        blame.setdefault(nodes[rank // ranks_per_node], []).append(reason)
    for node, reason in _communication(reports, nodes, ranks_per_node, limits):
        blame.setdefault(node, []).append(reason)
    return blame


def _clock_offsets(reports: dict[int, Report]) -> dict[int, float]:
    clocks = {rank: report.clock for rank, report in reports.items() if report.clock}
    middle = statistics.median(clocks.values()) if clocks else 0.0
    return {rank: clock - middle for rank, clock in clocks.items()}


def _communication(
    reports: dict[int, Report], nodes: Sequence[str], ranks_per_node: int, limits: Limits
) -> Iterator[tuple[str, str]]:
    """Pairs of a node, or "", and what is wrong."""
    best: dict[str, float] = {}  # of its two pairs
    for rank, report in reports.items():
        seconds = [value for name, value in report.seconds.items() if name != "all"]
        if len(seconds) == 2:  # else the check was broken off, and its partner is told by silence
            node = nodes[rank // ranks_per_node]
            best[node] = max(best.get(node, 0.0), min(seconds))
    usual = statistics.median(best.values()) if best else math.inf
    for node, value in best.items():
        if value == math.inf:
            yield node, "no all-reduce with either neighbour succeeds"
        elif value > limits.slow_factor * usual:
            yield node, f"all-reduces take {value:.3f} s, usual here are {usual:.3f} s"
    if any(report.seconds.get("all") == math.inf for report in reports.values()):
        yield "", "the all-reduce of all nodes fails"


def nodes_to_exclude(blame: dict[str, list[str]], nodes: Sequence[str]) -> list[str]:
    """The nodes to blame; none when all of them are, because the cause is then a shared one."""
    named = [node for node in nodes if node in blame]
    return [] if len(named) == len(nodes) else named


# ------------------------------------------------------------------------------------------ program


@dataclass(frozen=True)
class Check:
    """One rank's part in the check."""

    rank: int
    local_rank: int
    nodes: list[str]
    ranks_per_node: int
    device: torch.device
    folder: Path
    timeout: float  # seconds for each stage
    limits: Limits
    shared_memory: float = 0.0  # bytes of /dev/shm that each rank's data workers need

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.nodes) * self.ranks_per_node

    def run(self, store: dist.Store) -> dict[int, Report]:
        """Take part in all stages; on rank 0, the reports of all ranks that made one."""
        report = Report(self._own_problems())
        self._try_device(report)
        reports = self._exchange(store, "local", report)
        if self.rank == 0:
            well = len(reports) == self.size and not any(r.problems for r in reports.values())
            store.set("release", "go" if well else "stop")
        store.set_timeout(timedelta(seconds=2 * self.timeout))
        released = store.get("release")
        report.clock = time.time()
        if released == b"go":
            self._communicate(store, report)
            reports = self._exchange(store, "final", report)
        return reports

    def _own_problems(self) -> list[str]:
        found = []
        if self.local_rank == 0:
            found.append(disk_problem(self.folder, self.nodes[self.rank // self.ranks_per_node]))
            if self.shared_memory:
                found.append(shared_memory_problem(self.shared_memory * self.ranks_per_node))
        if self.device.type == "cuda":
            found.append(gpu_problem(self.local_rank, self.limits.free_memory))
        return [problem for problem in found if problem]

    def _try_device(self, report: Report) -> None:
        """Products with known answers, and speeds; a device that hangs is told by silence."""
        if report.problems:
            return
        try:
            problem, report.speeds["a matrix product"] = known_answers.compute(self.device)
            report.speeds["a copy within the memory"] = known_answers.memory(self.device)
        except RuntimeError as error:
            problem = f"{self.device}: {error}"
        report.problems += [problem] if problem else []

    def _communicate(self, store: dist.Store, report: Report) -> None:
        mine, local = divmod(self.rank, self.ranks_per_node)
        for name, groups in rounds(len(self.nodes)).items():
            group = next((group for group in groups if mine in group), None)
            if group is not None:
                own = dist.PrefixStore(f"{name} {group}", store)
                rank = group.index(mine) * self.ranks_per_node + local
                size = len(group) * self.ranks_per_node
                names = ", ".join(self.nodes[node] for node in group)
                try:
                    report.seconds[name] = self._all_reduce(own, rank, size)
                except RuntimeError as error:
                    report.seconds[name] = math.inf
                    print(f"[rank {self.rank}] all-reduce of {names}: {error}", file=sys.stderr)
                    if isinstance(error, NotEndedError):
                        # This process cannot join another group any more.
                        report.problems.append(f"the all-reduce of {names} {error}")
                        store.set("hangs", "")
            # Ranks whose group failed come late, and the next round must not begin without them.
            if not self._all_come(store, f"after {name}") or store.check(["hangs"]):
                break

    def _all_reduce(self, store: dist.Store, rank: int, size: int) -> float:
        """Seconds of an all-reduce; the other ranks wait for twice the time of a stage."""
        limit = timedelta(seconds=self.timeout)

        def work() -> float:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # each thread has its own
            return all_reduce_seconds(store, rank, size, self.device, limit)

        return within(1.5 * self.timeout, work)

    def _all_come(self, store: dist.Store, place: str) -> bool:
        """Wait until all ranks are here; False if one does not come."""
        if store.add(f"{place}: count", 1) == self.size:
            store.set(f"{place}: all", "")
        try:
            store.wait([f"{place}: all"], timedelta(seconds=2 * self.timeout))
        except dist.DistError:
            return False
        return True

    def _exchange(self, store: dist.Store, stage: str, report: Report) -> dict[int, Report]:
        """Report; on rank 0, the reports of all ranks that make one in time."""
        store.set(f"{stage}/{self.rank}", json.dumps(asdict(report)))
        end, found = time.monotonic() + self.timeout, {}
        for rank in range(self.size if self.rank == 0 else 0):
            left = timedelta(seconds=max(0.1, end - time.monotonic()))
            with contextlib.suppress(dist.DistError):
                store.wait([f"{stage}/{rank}"], left)
                found[rank] = Report(**json.loads(store.get(f"{stage}/{rank}")))
        return found


def make_check(options: argparse.Namespace, variables: dict[str, str]) -> Check:
    """This rank's check.

    Raises:
        ValueError: the nodes do not fit the number of ranks, or this rank is on another node than
            its number says.
    """
    rank, local_rank, size = (int(variables[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    nodes = options.nodes.split(",")
    if size % len(nodes):
        raise ValueError(f"{size} ranks on {len(nodes)} nodes: start as many tasks on every node")
    here, there = os.environ.get("SLURMD_NODENAME"), nodes[rank * len(nodes) // size]
    if here is not None and here != there:
        raise ValueError(
            f"rank {rank} is on {here} and not on {there}: name the nodes in Slurm's order and "
            "leave srun's --distribution at block"
        )
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return Check(
        rank=rank,
        local_rank=local_rank,
        nodes=nodes,
        ranks_per_node=size // len(nodes),
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        folder=options.folder,
        timeout=options.timeout,
        limits=Limits(
            options.max_clock_skew,
            options.slow_factor,
            slow_device=options.slow_device or (1.5 if cuda else Limits.slow_device),
        ),
        shared_memory=options.shared_memory * 1e6,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m m3i_scale.cluster.node_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="the run folder: written to")
    parser.add_argument("--nodes", required=True, help="names in the order of ranks, with commas")
    parser.add_argument(
        "--bad-nodes", type=Path, required=True, help="file for the bad ones' names"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each stage")
    parser.add_argument("--max-clock-skew", type=float, default=Limits.clock_skew, help="seconds")
    parser.add_argument("--slow-factor", type=float, default=Limits.slow_factor,
                        help="times the median all-reduce (%(default)s)")  # fmt: skip
    parser.add_argument("--slow-device", type=float, metavar="FACTOR",
                        help="times the median product, and copy in memory, of all ranks (1.5 on "
                        "GPUs, 10 on CPUs, which ranks share)")  # fmt: skip
    parser.add_argument(
        "--shared-memory", type=float, default=170, metavar="MB",
        help="of /dev/shm that the data workers of each rank need; 0: not checked (%(default)s, "
        "measured with configs/pretrain_internimage_h.yaml)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main() -> int:
    """Check; rank 0 tells the outcome."""
    code = _main()
    if any(thread.name == LEFT_BEHIND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what hangs would keep the process from ending
    return code


def _main() -> int:
    options = parse()
    variables = rank_variables(os.environ)
    check = make_check(options, variables)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout raises instead of aborting
    if check.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # told by gpu_problem
            torch.cuda.set_device(check.device)
    address, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=check.rank == 0,
            timeout=timedelta(seconds=check.timeout),
            wait_for_workers=False,
        )
        reports = check.run(store)
    except dist.DistError as error:
        print(f"[rank {check.rank}] no rank 0 at {address}:{port}: {error}", file=sys.stderr)
        return 1
    if check.rank:
        return 0
    blame = judge(reports, check.nodes, check.ranks_per_node, check.limits)
    for node, reasons in blame.items():
        print(f"{node or 'no single node'}: {'; '.join(reasons)}", flush=True)
    named = nodes_to_exclude(blame, check.nodes)
    options.bad_nodes.write_text("".join(f"{node}\n" for node in named))
    if not blame:
        print(f"{len(check.nodes)} nodes, {check.size} ranks: all is well", flush=True)
    return 1 if blame else 0


if __name__ == "__main__":
    sys.exit(main())
