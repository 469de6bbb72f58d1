"""Rows to CSV, Markdown and plots."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple


def write_csv(rows: Sequence[NamedTuple], path: pathlib.Path) -> None:
    """Write rows of one type with their field names as the header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)


def markdown(rows: Sequence[NamedTuple], columns: Sequence[str]) -> str:
    """Render the chosen columns as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_cell(getattr(row, c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(rows: Sequence[Any], path: pathlib.Path) -> None:
    """Draw the fraction of the copy bandwidth, one panel per direction."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    directions = list(dict.fromkeys(r.direction for r in rows))
    problems = list(dict.fromkeys(r.problem for r in rows))
    names = list(dict.fromkeys(r.implementation for r in rows))
    figure, panels = plt.subplots(
        len(directions),
        1,
        figsize=(max(6, len(problems) * 0.6), 3.2 * len(directions)),
        squeeze=False,
    )
    for panel, direction in zip(panels[:, 0], directions, strict=True):
        for i, name in enumerate(names):
            chosen = [r for r in rows if r.direction == direction and r.implementation == name]
            at = [problems.index(r.problem) + 0.8 * (i / len(names) - 0.5) for r in chosen]
            panel.bar(at, [r.fraction_of_copy for r in chosen], 0.8 / len(names), label=name)
        panel.set_xticks(range(len(problems)), problems, rotation=60, ha="right", fontsize=7)
        panel.set_ylabel("share of copy bandwidth")
        panel.set_title(f"{rows[0].operator} {direction}, {rows[0].dtype}, {rows[0].device}")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
