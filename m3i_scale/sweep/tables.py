"""A sweep's results as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from m3i_scale.sweep.results import Figure, MethodRow, Results

ABSENT = "–"


def markdown(results: Results) -> str:
    """One table for each section: accuracies in percent as mean ± standard deviation."""
    sweep = results.sweep
    title = sweep.title or sweep.name
    lines = [f"# {title}", "", _sentence(results), ""]
    for section, rows in results.sections.items():
        lines += [f"## {section}", ""] if section else []
        lines += [*_table(results, rows), ""]
    missing = [name for row in results.rows for name in row.missing]
    if missing:
        lines += [f"Not finished: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _sentence(results: Results) -> str:
    sweep = results.sweep
    return (
        f"Every run saw {sweep.samples:,} samples. Accuracy on held-out images in %, mean ± "
        "standard deviation over seeds. GFLOP: of training, per sample. Spread: of the target "
        "group that has least, at the end of training; 0 is collapse."
    )


def _table(results: Results, rows: Sequence[MethodRow]) -> list[str]:
    papers = list(dict.fromkeys(title for row in rows for title in row.paper))
    axis = list(results.sweep.axes)[-1]
    head = [axis, *results.tasks, "spread", "GFLOP", "seeds", *(f"paper: {t}" for t in papers)]
    body = [
        [
            row.name,
            *(_percent(row.trained.get(task)) for task in results.tasks),
            _number(row.spread, 1, 2),
            f"{row.gigaflops:.3g}",
            str(row.seeds),
            *(f"{row.paper[t]:g}" if t in row.paper else ABSENT for t in papers),
        ]
        for row in rows
    ]
    blanks = [""] * (3 + len(papers))
    untrained = [_percent(_pooled(rows, task)) for task in results.tasks]
    chance = [_share(row.chance.get(task) for row in rows) for task in results.tasks]
    body += [["*untrained*", *untrained, *blanks], ["*chance*", *chance, *blanks]]
    return _aligned([head, *body])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        texts = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return f"| {' | '.join(texts)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(table[0]), line(rule), *(line(cells) for cells in table[1:])]


def _pooled(rows: Iterable[MethodRow], task: str) -> Figure:
    """Untrained networks of all rows: one for each seed and architecture."""
    return Figure(tuple(v for row in rows if task in row.untrained for v in row.untrained[task][0]))


def _percent(figure: Figure | None) -> str:
    return ABSENT if figure is None else _number(figure, 100, 1)


def _number(figure: Figure, factor: float, digits: int) -> str:
    if not figure.values:
        return ABSENT
    mean = f"{factor * figure.mean:.{digits}f}"
    if math.isnan(figure.deviation):
        return mean
    return f"{mean} ± {factor * figure.deviation:.{digits}f}"


def _share(values: Iterable[float | None]) -> str:
    known = next((value for value in values if value is not None), None)
    return ABSENT if known is None else f"{100 * known:.1f}"


def as_csv(results: Results) -> str:
    """One line for each row and task; accuracies as shares, empty where there is no figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["section", "variant", "task", "mean", "std", "seeds", "values", "untrained", "chance",
         "spread", "gigaflop_per_sample", "samples"]
    )  # fmt: skip
    for row in results.rows:
        for task, figure in row.trained.items():
            writer.writerow(
                [
                    row.section,
                    row.name,
                    task,
                    _plain(figure.mean),
                    _plain(figure.deviation),
                    len(figure.values),
                    " ".join(map(_plain, figure.values)),
                    _plain(row.untrained[task].mean),
                    _plain(row.chance[task]),
                    _plain(row.spread.mean),
                    _plain(row.gigaflops),
                    results.sweep.samples,
                ]
            )
    return text.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
