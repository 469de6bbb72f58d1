"""The command `m3i sweep`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from m3i_scale.arguments import count_or_zero
from m3i_scale.config import ConfigError
from m3i_scale.engine.stop import STOPPED
from m3i_scale.sweep import checks, execute, progress, slurm
from m3i_scale.sweep.grid import Cell, cells
from m3i_scale.sweep.spec import Sweep, load_sweep

DESCRIPTION = """Run a grid of configurations and seeds at equal compute, and compare them.

The same command again skips finished runs, resumes an interrupted one and starts the rest. A run
that fails does not stop the others; the command names it at the end. Each run has a log in the
sweep's folder. When all runs are finished, and with --report at any time, the command writes
results.md, results.csv and results.png there.

Exit codes: 0 all chosen runs are finished; 1 some failed; 2 something is wrong with the file, and
the last line says what; 85 stopped by a signal, after saving."""


def register(subparsers: Any) -> None:
    """Add the command to an `ArgumentParser.add_subparsers()`; it sets `run(args) -> int`."""
    parser = subparsers.add_parser(
        "sweep",
        help="run a grid of configurations and seeds at equal compute, and compare them",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="YAML file; see experiments/m3i_small/sweeps/")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="changes to the sweep file"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="check all configurations and list the runs"
    )
    what.add_argument("--report", action="store_true", help="compare what is finished; run nothing")
    what.add_argument(
        "--slurm", action="store_true", help="write a Slurm array script of what is left"
    )
    parser.add_argument(
        "--only",
        type=count_or_zero,
        metavar="INDEX",
        help="one run, by its number in the list of --dry-run",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`m3i sweep`."""
    sweep = load_sweep(options.file, options.overrides)
    grid = cells(sweep, options.file)
    for cell in grid:
        progress.require_unchanged(cell)
    if options.report:
        return _report(sweep, grid)
    checks.require_possible(sweep, grid)
    chosen = _chosen(grid, options.only)
    if options.dry_run:
        return _list(sweep, chosen)
    if options.slurm:
        return _slurm(options, sweep, chosen)
    code = _run(sweep, chosen)
    some = any(progress.is_finished(cell, sweep.evaluation) for cell in grid)
    if options.only is None and code != STOPPED and some:
        _report(sweep, grid)
    return code


def _chosen(grid: Sequence[Cell], only: int | None) -> Sequence[Cell]:
    if only is None:
        return grid
    if not 0 <= only < len(grid):
        raise ConfigError(f"--only {only}: the sweep has runs 0 to {len(grid) - 1}")
    return [grid[only]]


def _list(sweep: Sweep, chosen: Sequence[Cell]) -> int:
    for cell in chosen:
        print(f"{cell.number:4d}  {cell.name}  {progress.state(cell, sweep.evaluation)}")
    print(
        f"{len(chosen)} runs of {sweep.samples:,} samples in {sweep.own_folder}; all "
        "configurations are valid"
    )
    return 0


def _slurm(options: argparse.Namespace, sweep: Sweep, chosen: Sequence[Cell]) -> int:
    left = [c.number for c in chosen if not progress.is_finished(c, sweep.evaluation)]
    if not left:
        print("all runs are finished")
        return 0
    path = slurm.write_script(sweep, options.file, options.overrides, left)
    print(f"sbatch {path}")
    return 0


def _run(sweep: Sweep, chosen: Sequence[Cell]) -> int:
    outcomes = execute.run_cells(sweep, chosen)
    failed = [outcome for outcome in outcomes if outcome.what == "failed"]
    for outcome in failed:
        print(f"failed: {outcome.cell.name}: {outcome.why}", file=sys.stderr)
    for outcome in outcomes:
        if outcome.what == "taken":
            print(f"{outcome.cell.name} is being run by another process", file=sys.stderr)
    if any(outcome.what == "stopped" for outcome in outcomes):
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    if failed:
        print(f"{len(failed)} of {len(chosen)} runs failed", file=sys.stderr)
    return 1 if failed else 0


def _flops(cell: Cell) -> float:
    from m3i_scale.integrations.frozen import make_skeletons
    from m3i_scale.profiling.flops import mean_flops, run_flops

    config = cell.config
    counted = run_flops(config, make_skeletons(config))
    return mean_flops(config.data.sizes.values(), counted.values()).model


def _report(sweep: Sweep, grid: Sequence[Cell]) -> int:
    from m3i_scale.sweep import plot, results, tables

    found = results.collect(sweep, grid, _flops)
    if not any(row.seeds for row in found.rows):
        raise ConfigError(f"no run of {sweep.own_folder} is finished; there is nothing to compare")
    folder = sweep.own_folder
    (folder / "results.md").write_text(tables.markdown(found))
    (folder / "results.csv").write_text(tables.as_csv(found))
    plot.save_plot(folder / "results.png", found)
    print(tables.markdown(found), end="")
    return 0
