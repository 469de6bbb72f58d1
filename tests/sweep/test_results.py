from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest

from helpers.sweeps import GRID, finish, make
from m3i_scale.sweep import plot, results, tables
from m3i_scale.sweep.grid import Cell


def flops(cell: Cell) -> float:
    return 3e9


@pytest.fixture
def found(tmp_path: Path) -> results.Results:
    """Two backbones, two gammas, two seeds; the last cell is not finished."""
    axes = {"backbone": [{"name": "p"}, {"name": "q"}], **GRID["axes"]}
    sweep, grid = make(tmp_path, axes=axes)
    for n, cell in enumerate(grid[:-1]):
        accuracy = {"kNN": 0.1 * n, **({"zero-shot": 0.5} if n in (1, 5) else {})}
        spreads = [{"spread/a": 9.0}] * 9 + [{"spread/a": 0.5, "spread/b": 0.25 + n}]
        finish(cell, sweep, accuracy, untrained=0.01 * n, spreads=spreads if n != 1 else [{}])
    return results.collect(sweep, grid, flops)


def test_figures_are_those_of_the_files(found: results.Results):
    rows = {(row.section, row.name): row for row in found.rows}
    assert list(rows) == [("p", "0.5"), ("p", "one"), ("q", "0.5"), ("q", "one")]
    first = rows["p", "0.5"]  # cells 0 and 4
    assert first.trained["kNN"].values == (0.0, 0.4)
    assert first.trained["kNN"].mean == pytest.approx(0.2)
    assert first.trained["kNN"].deviation == pytest.approx(0.4 / math.sqrt(2))
    assert first.untrained["kNN"].values == (0.0, 0.04)
    assert first.chance == {"kNN": 0.125}
    assert first.spread.values == (0.25, 0.5)  # the least group's, last tenth of the steps
    assert (first.seeds, first.missing, first.gigaflops) == (2, (), 3)
    last = rows["q", "one"]  # cells 3 and 7, which is missing
    assert (last.seeds, last.missing) == (1, ("q-one-seed5",))
    assert math.isnan(last.trained["kNN"].deviation)
    assert last.paper == {"top-1": 83.3, "AP": 50}
    assert rows["p", "one"].spread.values == (0.5,)  # cell 1 has no spread
    assert found.tasks == ["kNN", "zero-shot"]


def test_markdown(found: results.Results):
    text = tables.markdown(found)
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert (
        "| gamma | kNN | zero-shot | spread | GFLOP | seeds | paper: top-1 | paper: AP |" in lines
    )
    assert "| 0.5 | 20.0 ± 28.3 | – | 0.38 ± 0.18 | 3 | 2 | 83.2 | – |" in lines
    assert "| one | 30.0 ± 28.3 | 50.0 ± 0.0 | 0.50 | 3 | 2 | 83.3 | 50 |" in lines
    assert "| one | 30.0 | – | 0.50 | 3 | 1 | 83.3 | 50 |" in lines
    assert "| *chance* | 12.5 | 12.5 | | | | | |" in lines
    assert [line for line in lines if line.startswith("## ")] == ["## p", "## q"]
    assert "Not finished: q-one-seed5." in lines
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) <= 2  # aligned within each section


def test_csv(found: results.Results):
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert len(rows) == 5
    row = next(r for r in rows if (r["section"], r["variant"], r["task"]) == ("p", "0.5", "kNN"))
    assert (row["mean"], row["std"], row["seeds"]) == ("0.2", "0.282843", "2")
    assert (row["values"], row["samples"], row["chance"]) == ("0 0.4", "44", "0.125")
    assert next(r for r in rows if r["section"] == "q" and r["variant"] == "one")["std"] == ""


def test_the_order_of_the_tasks_can_be_given(tmp_path: Path):
    sweep, grid = make(tmp_path, report={"tasks": ["b", "a"]})
    finish(grid[0], sweep, {"a": 0.5, "b": 0.25, "c": 1.0})
    assert results.collect(sweep, grid, flops).tasks == ["b", "a"]


def test_plot(found: results.Results, tmp_path: Path):
    plot.save_plot(tmp_path / "plot.png", found)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
