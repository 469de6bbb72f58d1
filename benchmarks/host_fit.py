"""Fit the host's part of `m3i plan` to measurements of `host_time.py`.

    python benchmarks/host_fit.py [FOLDER]

Reads all FOLDER/*.json (benchmarks/results/host_time by default); those in FOLDER/held_out/ are
compared and not fitted. Prints `SECONDS` for m3i_scale/planner/host.py, and measured beside planned
seconds. Networks have about four times as many visits of modules as tensors, whatever their size,
so that a step alone does not tell the two apart: the seconds of a module are fitted to the networks
without ZeRO, those of tensors and slices to what that leaves of a step at ZeRO stage 3, those of
gradients to what it leaves at stages 1 and 2. Relative errors are made
small (least squares). The fastest step after the second counts, and the fastest pass of the same
networks: other programs on the machine make them slower, never faster.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m3i_scale.config import Config, load_config
from m3i_scale.planner.estimate import Cluster, make_plan, trace_of
from m3i_scale.planner.gpus import gpu
from m3i_scale.planner.host import Work
from m3i_scale.profiling.record import Trace

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "host_time"


class Row(NamedTuple):
    """One measurement beside what the step visits."""

    name: str
    work: Work
    measured: float  # seconds
    networks: float  # seconds without ZeRO


def traced(file: str, overrides: list[str]) -> tuple[Config, Trace]:
    """Configuration and networks of a measurement."""
    networks = tuple(word for word in overrides if not word.startswith("engine."))
    return load_config(ROOT / file, overrides), _networks(file, networks)


@cache
def _networks(file: str, overrides: tuple[str, ...]) -> Trace:
    return trace_of(load_config(ROOT / file, list(overrides)))


def row(name: str, found: dict[str, Any]) -> Row:
    """Count the work of one measurement."""
    stage = f"engine.zero.stage={found.get('stage', 3)}"  # of older files, where there was one
    config, seen = traced(found["config"], [*found["overrides"], stage])
    ranks, accumulation = found["ranks"], found["accumulation"]
    micro = 2  # changes nothing that Python visits
    optimizer = config.optimizer.model_copy(
        update={"global_batch_size": micro * ranks * accumulation, "max_micro_batch": micro}
    )
    config = config.model_copy(update={"optimizer": optimizer})
    plan = make_plan(config, seen, Cluster(gpu("h100"), 1, ranks))
    return Row(name, plan.work, min(found["steps"][2:]), found["parts"]["networks_alone"])


def rows(folder: Path) -> list[Row]:
    """All measurements of a folder."""
    found = [row(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    fastest: dict[int, float] = {}  # by visits, of which the same networks have the same number
    for one in found:
        visits = one.work.modules
        fastest[visits] = min(one.networks, fastest.get(visits, one.networks))
    return [one._replace(networks=fastest[one.work.modules]) for one in found]


def fit(measured: list[Row]) -> list[float]:
    """Seconds of each kind of work, none negative.

    Raises:
        ValueError: the measurements leave a kind of work without a cost: more of them are needed.
    """
    kinds = zip(*(one.work for one in measured), strict=True)
    if len(measured) < len(Work._fields) or not all(map(any, kinds)):
        raise ValueError("the measurements do not show every kind of work: measure more sizes")
    partitioned = [one for one in measured if not one.work.gradients]
    flat = [one for one in measured if one.work.gradients]
    module = _smallest_error(  # once for each: at stages 1 and 2 the networks are the same
        [[one.work.modules] for one in partitioned],
        [one.networks for one in partitioned],
        [one.networks for one in partitioned],
    )
    found = list(module)
    for names, some in ((("tensors", "slices"), partitioned), (("gradients",), flat)):
        found += _smallest_error(
            [[getattr(one.work, name) for name in names] for one in some],
            [one.measured - module[0] * one.work.modules for one in some],
            [one.measured for one in some],
        )
    if min(found) <= 0:
        raise ValueError(f"a kind of work seems to cost nothing: {found}; measure more sizes")
    return found


def _smallest_error(
    counts: list[list[int]], seconds: list[float], whole: list[float]
) -> list[float]:
    """Seconds of each count, with the least squares of errors as shares of `whole`."""
    shares = 1 / torch.tensor(whole, dtype=torch.float64)[:, None]
    table = torch.tensor(counts, dtype=torch.float64) * shares
    scale = table.amax(0)
    times = torch.tensor(seconds, dtype=torch.float64)[:, None] * shares
    solution = torch.linalg.lstsq(table / scale, times).solution[:, 0]
    found: list[float] = (solution / scale).tolist()
    return found


def main(arguments: list[str]) -> int:
    """Fit and print."""
    folder = Path(arguments[0]) if arguments else RESULTS
    used, held_out = rows(folder), rows(folder / "held_out")
    found = fit(used)
    print(f"SECONDS = ({', '.join(f'{value:.3g}' for value in found)})")
    for title, group in (("fitted", used), ("held out", held_out)):
        for one in group:
            planned = sum(c * s for c, s in zip(one.work, found, strict=True))
            print(f"{title:9s}{one.name:36s} measured {one.measured:6.3f} planned {planned:6.3f} "
                  f"{planned / one.measured - 1:+5.0%}  {tuple(one.work)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
