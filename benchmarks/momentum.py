"""The teacher under ZeRO-3: updated on the local shards, or gathered to rank 0.

    python benchmarks/momentum.py [--backbone intern_image_t] [--ranks 1 2 3 4]

Two ways to apply `theta' <- m theta' + (1 - m) theta` when the parameters are partitioned:

- *shards*: every rank moves its own slice (`m3i_scale.engine.momentum`);
- *gather*: all parameters are gathered on all ranks, and rank 0 updates a full copy, as the EMA of
  the official InternImage trainer does.

Both start from the same weights and see the same students; after several updates the two averages
must be equal to the last bit, before anything is timed. Then updates of both kinds alternate.
Reported are medians over `--updates` of the slowest rank's seconds; bytes that all ranks together
send, counted at the loopback interface (run it where nothing else uses that: `unshare --net`); and
by how much the memory of the most loaded rank rises over what the run holds anyway: the averages
themselves, and what an update needs for a moment.

Writes momentum.csv and momentum.png to `--out`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forks import Ranks

COEFFICIENT = 0.995
WAYS = ("shards", "gather")
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**12,
}


class GatheredMomentum:
    """The average as one full copy on rank 0."""

    def __init__(self, student: Any, is_main: bool) -> None:
        self.student, self.is_main = student, is_main
        self.averages: dict[str, Any] = {}
        with self._gathered():
            if is_main:
                self.averages = {n: p.detach().clone() for n, p in student.named_parameters()}

    def update(self, coefficient: float) -> None:
        """Apply the rule (a collective)."""
        with self._gathered():
            for name, average in self.averages.items():
                average.lerp_(self.student.get_parameter(name).detach(), 1 - coefficient)

    def _gathered(self) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.student.parameters()))


def loopback_bytes() -> int:
    """Bytes sent through the loopback interface since it exists."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def memory(kind: str) -> int:
    """Resident bytes of this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def give_back_memory() -> None:
    """Return what is free to the system, or it would be used again unseen (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Let `VmHWM` start again from now."""
    Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------- on one rank


def measure(backbone: str, updates: int, out: Path) -> int:
    """What each rank does; rank 0 writes the findings to `out` as JSON."""
    from m3i_scale.cluster import launch

    world = launch.start("cpu", "fp32", 0, 10)
    import deepspeed  # after `launch.start`, which chooses its accelerator
    import torch

    from m3i_scale.engine.momentum import ShardedTeacher, start_equal
    from m3i_scale.engine.partitioned import Partitioned
    from m3i_scale.models.backbone import build_backbone

    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        pair = torch.nn.ModuleList(build_backbone(backbone) for _ in range(2))  # type: ignore[misc]
    student, momentum = pair
    momentum.requires_grad_(False)
    start_equal(student, momentum)
    trained = torch.optim.SGD(student.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=pair, optimizer=trained, config=SETTINGS)
    own = Partitioned(engine.optimizer)
    makers: dict[str, Callable[[], Any]] = {
        "shards": lambda: ShardedTeacher(own, student, momentum, world.device),
        "gather": lambda: GatheredMomentum(student, world.is_main),
    }
    require_equal(own, momentum, makers)
    ways: dict[str, Any] = {}
    numbers = [getattr(p, "ds_numel") for p in student.parameters()]  # DeepSpeed's  # noqa: B009
    found: dict[str, float] = {"parameters": sum(numbers)}
    for name, make in makers.items():
        give_back_memory()
        before = memory("VmRSS")
        ways[name] = make()
        ways[name].update(COEFFICIENT)
        give_back_memory()
        held = memory("VmRSS") - before
        reset_peak()
        ways[name].update(COEFFICIENT)
        found[f"{name} held"] = largest(held)
        found[f"{name} peak"] = largest(memory("VmHWM") - before)
    idle, rows = [], []
    for _ in range(updates):
        idle.append(timed(lambda: None))
        rows.append({name: timed(partial(way.update, COEFFICIENT)) for name, way in ways.items()})
    for name in ways:
        found[f"{name} seconds"] = statistics.median(row[name][0] for row in rows)
        sent = statistics.median(row[name][1] for row in rows)
        found[f"{name} bytes"] = max(0, sent - statistics.median(one[1] for one in idle))
    if world.is_main:
        out.write_text(json.dumps(found))
    launch.finish()
    return 0


def require_equal(own: Any, momentum: Any, makers: dict[str, Callable[[], Any]]) -> None:
    """Update both ways while the student changes.

    Raises:
        RuntimeError: rank 0's full copy is not the sharded average, bit for bit.
    """
    import deepspeed
    import torch

    both = [make() for make in makers.values()]
    for _ in range(3):
        for flat in own.masters:
            flat.data.add_(torch.randn_like(flat), alpha=0.01)
        own.publish()
        for one in both:
            one.update(COEFFICIENT)
    with deepspeed.zero.GatheredParameters(list(momentum.parameters())):
        names = dict(momentum.named_parameters())
        if any(not torch.equal(names[n], full) for n, full in both[1].averages.items()):
            raise RuntimeError("the two ways disagree")


def timed(update: Callable[[], None]) -> tuple[float, int]:
    """Seconds of the slowest rank, and bytes through the loopback interface."""
    import torch.distributed as dist

    dist.barrier()
    sent, began = loopback_bytes(), time.perf_counter()
    update()
    seconds = largest(time.perf_counter() - began)
    return seconds, loopback_bytes() - sent


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    import torch
    import torch.distributed as dist

    table = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return float(table)


# ----------------------------------------------------------------------------------------- program


def print_table(rows: list[dict[str, Any]]) -> None:
    """Both ways, and how many times the one is the other."""
    print("| backbone | M parameters | ranks | way | MB sent | ms | held MiB | peak MiB |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        for way in WAYS:
            cells = (
                row["backbone"],
                f"{row['parameters'] / 1e6:.1f}",
                row["ranks"],
                way,
                f"{row[f'{way} bytes'] / 1e6:.2f}",
                f"{1e3 * row[f'{way} seconds']:.1f}",
                f"{row[f'{way} held'] / 2**20:.0f}",
                f"{row[f'{way} peak'] / 2**20:.0f}",
            )
            print("| " + " | ".join(map(str, cells)) + " |")
        ratio = row["gather seconds"] / row["shards seconds"]
        peaks = row["gather peak"] / row["shards peak"]
        print(f"| | | {row['ranks']} | ratio | | {ratio:.1f} x | | {peaks:.1f} x |")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes, time and memory over the number of ranks."""
    from matplotlib.figure import Figure

    panels = {"bytes": ("MB sent per update", 1e6), "seconds": ("ms per update", 1e-3),
              "peak": ("peak MiB of a rank", 2**20)}  # fmt: skip
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (kind, (label, unit)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for way in WAYS:
            values = [row[f"{way} {kind}"] / unit for row in rows]
            axes.plot([row["ranks"] for row in rows], values, marker="o", label=way)
        axes.set(xlabel="ranks", ylabel=label, ylim=(0, None), xticks=[r["ranks"] for r in rows])
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure all combinations, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="intern_image_t", help="its size is the model's")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("docs/momentum"))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401  (once, here, and not in every rank)

    import m3i_scale.engine.momentum
    import m3i_scale.models.backbone  # noqa: F401

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            out = Path(folder) / f"{ranks}.json"
            work = partial(measure, args.backbone, args.updates, out)
            Ranks(ranks, work, Path(folder) / out.stem).finish(3600)
            rows.append({"backbone": args.backbone, "ranks": ranks, **json.loads(out.read_text())})
            print(f"{ranks} ranks: done", file=sys.stderr, flush=True)
    print_table(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "momentum.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / "momentum.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
