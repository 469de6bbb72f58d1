"""The report of a session: rows to Markdown and plots.

    python benchmarks/gpu_session/report.py OUT

Reads OUT/rows.jsonl, writes OUT/report.md with planned.png, kernels.png, matrix.png and dcnv3.png,
and prints the table of the parts. What was not measured is left out and said to be missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kernel_names
import plots
import rows

Row = dict[str, Any]
INCOMPLETE = (KeyError, IndexError, ValueError, TypeError, StopIteration, ZeroDivisionError)
GOAL_HOST = {1: 0.9, 8: 1.0, 160: 1.2}  # seconds of a step


def main(arguments: list[str]) -> int:
    """Write the report; 2 where there are no rows."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "rows.jsonl").exists():
        print("error: name a folder that run.sh has written; it has a rows.jsonl", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    found = rows.read(folder / "rows.jsonl")
    table = parts_table(found)
    sections = [opening(found), "## Parts\n\n" + table]
    for write in (setup, tests, transfer, audit, step, host, matrix, depthwise, dcnv3):
        part = write.__name__
        try:
            sections.append(write(found, folder) if of(found, part) else "")
        except INCOMPLETE as error:
            why = f"{type(error).__name__}: {error}"
            sections.append(f"## {part}\n\nNot all of its rows are there ({why}).")
    (folder / "report.md").write_text("\n\n".join(s.strip() for s in sections if s) + "\n")
    print(table)
    print(f"report: {folder / 'report.md'}")
    return 0


def of(found: list[Row], part: str, **values: Any) -> list[Row]:
    """The rows of a part that have these values."""
    return [r for r in found if r["part"] == part and all(r.get(k) == v for k, v in values.items())]


def opening(found: list[Row]) -> str:
    """What was measured where."""
    where = next((r for r in found if r.get("device")), {})
    words = "; ".join(f"{k} {where.get(k)}" for k in ("driver", "torch", "triton", "deepspeed"))
    text = f"# A session on {where.get('device', 'an unknown device')}\n\n{words}; commit "
    text += f"{where.get('commit', 'unknown')}."
    if where.get("device") == "cpu":
        text += " **A rehearsal on a CPU: small sizes, no figure means anything.**"
    return text


def parts_table(found: list[Row]) -> str:
    """Part, seconds, outcome and the figure that matters most."""
    lines = [
        [r["name"], f"{r['seconds']:.0f} of {r['limit']}", r["outcome"], headline(found, r["name"])]
        for r in of(found, "parts")
    ]
    return markdown(["part", "seconds", "outcome", "headline"], lines)


def headline(found: list[Row], part: str) -> str:
    """One figure of a part, or nothing where it has none."""
    try:
        return HEADLINES[part](of(found, part))
    except INCOMPLETE:
        return "-"


def _step_headline(mine: list[Row]) -> str:
    row = [r for r in mine if r["name"].startswith("micro-batch")][-1]
    if row["note"] and "step_ms_p50" not in row:
        return f"{row['name']}: {row['note']}"
    device = f", on the device {row['kernel_ms']:.0f} ms" if row.get("kernel_ms") else ""
    return f"{row['name']}: {row['step_ms_p50']:.0f} ms{device}, {row['peak_memory_gib']:.1f} GiB"


def _share_headline(mine: list[Row]) -> str:
    timed = [r for r in mine if r.get("fraction_of_copy")]
    best = max(timed, key=lambda r: r["fraction_of_copy"])
    share = f"{best['fraction_of_copy']:.0%} of copy"
    return f"best: {best['implementation']}, {best['name']} {best['direction']}, {share}"


def _matrix_headline(mine: list[Row]) -> str:
    skipped = [r["note"] for r in mine if r["name"] == "skipped"]
    if skipped:
        return f"not run: {skipped[0]}"
    checks = [r for r in mine if r.get("kind") in ("check", "limit")]
    times = [gather["ms"] / best["ms"] for gather, best in against_gather(mine)]
    text = f"{sum(r['ok'] for r in checks)} of {len(checks)} checks hold"
    return text + (f", {min(times):.1f} to {max(times):.1f} times the gather" if times else "")


def _depthwise_headline(mine: list[Row]) -> str:
    ratios = [float(line[-1]) for line in branch_lines(mine) if line[1] == "both"]
    return f"the kernels are {min(ratios):.2f} to {max(ratios):.2f} times as fast as torch"


def _host_headline(mine: list[Row]) -> str:
    known = [r for r in mine if r["ok"]]
    return ", ".join(f"{r['name']}: {r['seconds_per_step']:.2f} s" for r in known) or "-"


def _audit_headline(mine: list[Row]) -> str:
    return f"{sum(r['ok'] for r in mine)} of {len(mine)} checks hold"


HEADLINES: dict[str, Callable[[list[Row]], str]] = {
    "setup": lambda mine: f"Python {mine[0]['python']}, gcc {mine[0]['gcc'] or 'missing'}",
    "tests": lambda mine: "{passed} passed, {failed} failed".format(**mine[-1]),
    "transfer": _audit_headline,
    "audit": _audit_headline,
    "step": _step_headline,
    "host": _host_headline,
    "matrix": _matrix_headline,
    "depthwise": _depthwise_headline,
    "dcnv3": _share_headline,
}


def setup(found: list[Row], _: Path) -> str:
    """The machine."""
    row = of(found, "setup", name="environment")[0]
    keys = ("python", "cuda", "cudnn", "gcc", "python_h", "nvcc", "cores", "host_memory_gib")
    lines = [[key, cell(row[key])] for key in (*keys, "gpu_memory_gib", "shm_gib")]
    return "## Machine\n\n" + markdown(["", ""], lines)


def tests(found: list[Row], _: Path) -> str:
    """Counts, and what failed."""
    mine = of(found, "tests")
    counts = next(r for r in mine if r["name"] == "counts")
    text = f"## Kernel tests\n\n{counts['passed']} passed, {counts['failed']} failed, "
    text += f"{counts['skipped']} skipped{', then stopped' if counts['stopped'] else ''}; "
    text += f"the longest took {max(counts['slowest'].values(), default=0)} s.\n\n"
    failed = [[r["name"], r["message"][-200:]] for r in mine if "message" in r]
    return text + (markdown(["failed", "message"], failed) if failed else "")


def audit(found: list[Row], _: Path) -> str:
    """All checks, and where the host waits."""
    mine = of(found, "audit")
    details = [r.get("note") or ", ".join(r.get("differ", [])) for r in mine]
    text = "## Audit\n\n" + checks(mine, details)
    for r in mine:
        if r.get("sites"):
            sites = [[site, str(count)] for site, count in r["sites"].items()]
            text += "\n\nWaits in all measured steps:\n\n" + markdown(["where", "times"], sites)
    return text


def transfer(found: list[Row], _: Path) -> str:
    """Losses of each head on both devices, and what it came to in bfloat16."""
    mine, details = of(found, "transfer"), []
    for r in mine:
        more = [f"{name} {cell(value)}" for name, value in (r.get("evaluation") or {}).items()]
        more += [f"{1e3 * r['step_seconds']:.0f} ms a step"] if "step_seconds" in r else []
        if r.get("computed_twice") is not None:
            more += [f"{r['computed_twice']:.0f} computed twice"]
        details.append(", ".join(more))
    return "## Transfer\n\n" + checks(mine, details)


def checks(mine: list[Row], details: list[str]) -> str:
    """Table of checks: what holds, figure and bound; the error, or else the detail."""
    lines = [
        [r["name"], "yes" if r["ok"] else "**no**", cell(r["figure"]), cell(r["bound"]),
         r.get("error") or detail]
        for r, detail in zip(mine, details, strict=True)
    ]  # fmt: skip
    return markdown(["check", "holds", "figure", "bound", "detail"], lines)


def step(found: list[Row], folder: Path) -> str:
    """Planned against measured, warm-up, longest kernels."""
    mine = of(found, "step")
    text = "## Training step\n\n"
    runs = [r for r in mine if r["name"].startswith("micro-batch")]
    text += "\n".join(f"- {r['name']}: {r['note']}" for r in runs if r["note"]) + "\n\n"
    run = runs[-1]
    if run.get("warmup"):
        text += f"Seconds of the warm-up steps: {_list(run['warmup'])}; "
        text += f"of the measured ones: {_list(run.get('steps') or [])}.\n\n"
    if run.get("dcnv3"):
        text += "\n".join(f"- {line}" for line in run["dcnv3"]) + "\n\n"
        alone = _list(run.get("gather_steps") or [])
        text += f"Seconds of steps with DCNv3's gather kernels alone: {alone}.\n\n"
    if twice := run.get("twice"):
        equal, count = twice["verify/steps_computed_twice"], len(twice["seconds"])
        text += f"Seconds of steps that are computed twice: {_list(twice['seconds'])}; "
        text += f"equal bit for bit: {equal:.0f} of {count}. "
        text += f"Peak {twice['peak_memory_gib']:.1f} GiB. {twice['problem']}\n\n"
    for r in mine:
        if r["name"].startswith("ZeRO stage 1") and r.get("step_ms_p50"):
            text += f"{r['name']}: {r['step_ms_p50']:.0f} ms, {r['peak_memory_gib']:.1f} GiB.\n\n"
    micro = run["name"].split()[-1]
    plan = next((r for r in mine if r["name"] == f"plan {micro}"), None)
    lines = list(comparison(run, plan)) if run.get("step_ms_p50") else []
    if not plan:
        text += "There is no plan of this step: the log of this part says why.\n\n"
    text += markdown(["", "unit", "planned", "measured"], lines) + "\n\n"
    if plan and lines and plots.planned(run, plan, folder / "planned.png"):
        text += "![planned and measured](planned.png)\n\n"
    twice_too = of(found, "step", name="kernel of a step computed twice")
    if twice_too:
        title = f"longest kernels of a step computed twice, {run.get('twice_kernel_ms', 0):.0f} ms"
        text += markdown([title, "calls", "ms"], kernel_lines(twice_too)) + "\n\n"
    if of(found, "step", name="kernel"):
        longest = kernel_lines(of(found, "step", name="kernel"))
        text += markdown(["longest kernels", "calls", "ms a step"], longest) + "\n\n"
        plots.kernels(of(found, "step", name="kernel"), run, folder / "kernels.png")
        text += "![longest kernels](kernels.png)"
    return text


def kernel_lines(mine: list[Row]) -> list[list[str]]:
    """Kernels by name, calls and milliseconds."""
    return [
        [kernel_names.short(r["kernel"]), str(r["calls"]), f"{r['milliseconds']:.2f}"] for r in mine
    ]


def comparison(run: Row, plan: Row | None) -> Iterator[list[str]]:
    """Rows of planned against measured."""
    planned = plan or {}
    recomputed = None
    if run.get("tflops_per_device"):
        more = run["hardware_tflops_per_device"] / run["tflops_per_device"]
        recomputed = run["gflops_per_image"] * more
    for name, unit, key, measured in (
        ("step", "ms", "step_ms", run["step_ms_p50"]),
        ("work on the device", "ms", "computing_ms", run.get("kernel_ms")),
        ("throughput", "images/s", "images_per_second", run["images_per_second"]),
        ("peak of tensors", "GiB", "tensors_gib", run["peak_memory_gib"]),
        ("peak with what libraries take", "GiB", "memory_gib", None),
        ("FLOPs of the model", "GFLOP an image", "gflops_per_image", run.get("gflops_per_image")),
        ("FLOPs with recomputation", "GFLOP an image", "hardware_gflops_per_image", recomputed),
        ("model FLOPs utilisation", "of the bf16 peak", "utilisation", run.get("mfu")),
    ):
        yield [name, unit, cell(planned.get(key)), cell(measured)]


def host(found: list[Row], _: Path) -> str:
    """Host seconds by ranks."""
    lines = [
        [r["name"], cell(r.get("seconds_per_step")), cell(GOAL_HOST.get(r["ranks"])),
         cell(r.get("second_step_seconds")), cell(r.get("collectives_after_step")),
         str(r.get("error", ""))[:120]]
        for r in of(found, "host")
    ]  # fmt: skip
    titles = ["", "s a step", "goal", "second step, s", "collectives after it", ""]
    return "## Host time\n\n" + markdown(titles, lines)


def matrix(found: list[Row], folder: Path) -> str:
    """What is right, the shipped and the fastest tile beside the gather kernel, all tiles."""
    mine = of(found, "matrix")
    checks = [r for r in mine if r.get("kind") in ("check", "limit")]
    text = f"## DCNv3, matrix kernels\n\n{_matrix_headline(mine)}."
    wrong = [[r["name"], str(r.get("direction", "")), str(r.get("errors", ""))]
             for r in checks if not r["ok"]]  # fmt: skip
    if wrong:
        text += "\n\n" + markdown(["wrong", "direction", "errors"], wrong)
    lines = []
    for gather, best in against_gather(mine):
        shipped = next((r for r in mine if _same(r, gather) and r.get("shipped")), None)
        lines.append(
            [gather["name"], gather["direction"], cell(gather["ms"]), tile(shipped), tile(best),
             f"{gather['ms'] / best['ms']:.2f}", f"{gather['fraction_of_copy']:.0%}",
             f"{best['fraction_of_copy']:.0%}"]
        )  # fmt: skip
    if not lines:
        return text
    titles = ["problem", "direction", "gather, ms", "matrix as shipped", "fastest tile",
              "times as fast", "gather, of copy", "matrix, of copy"]  # fmt: skip
    text += "\n\n" + markdown(titles, lines)
    pairs = [row for pair in against_gather(mine) for row in pair]
    plots.shares(pairs, folder / "matrix.png")
    return text + "\n\n![share of copy](matrix.png)"


def against_gather(mine: list[Row]) -> list[tuple[Row, Row]]:
    """The gather kernel and the fastest matrix kernel of every problem and direction."""
    times = [r for r in mine if r.get("kind") == "time"]
    pairs = []
    for gather in (r for r in times if r["implementation"] == "gather"):
        others = [r for r in times if _same(r, gather) and r["implementation"] == "matrix"]
        if others:
            pairs.append((gather, min(others, key=lambda r: r["ms"])))
    return pairs


def _same(row: Row, other: Row) -> bool:
    keys = ("name", "direction", "kind")
    return all(row.get(key) == other[key] for key in keys)


def tile(row: Row | None) -> str:
    """Milliseconds and tile of one matrix kernel."""
    return f"{row['ms']:.4g} ms (P {row['P']}, {row['NW']} warps)" if row else "-"


def depthwise(found: list[Row], _: Path) -> str:
    """The whole branch by our kernels and by torch; the convolution alone by layout."""
    mine = of(found, "depthwise")
    titles = ["problem", "direction", "torch eager, ms", "kernels, ms", "times as fast"]
    text = "## Depthwise branch: convolution, LayerNorm, GELU\n\n"
    text += markdown(titles, list(branch_lines(mine))) + "\n\n"
    text += timed([r for r in mine if r.get("fraction_of_copy")])
    alone = [r for r in mine if r.get("implementation") == "cudnn" and not r.get("search")]
    layouts = ("nchw", "channels_last")
    lines = []
    for stage in dict.fromkeys((r["channels"], r["side"]) for r in alone):
        for direction in ("forward", "dgrad", "wgrad"):
            here = {"channels": stage[0], "side": stage[1], "direction": direction}
            cells = [
                next((f"{r['ms']:.3f}" for r in of(alone, "depthwise", **here, layout=layout)), "-")
                for layout in layouts
            ]
            lines.append([f"{stage[0]} x {stage[1]} {direction}", *cells])
    return text + "\n\nThe convolution alone, cuDNN, ms:\n\n" + markdown(["", *layouts], lines)


def branch_lines(mine: list[Row]) -> Iterator[list[str]]:
    """Our kernels beside torch's layers, by stage and direction."""
    times = {(r["name"], r["direction"], r["implementation"]): r["ms"] for r in mine if "ms" in r}
    for (name, direction, implementation), ours in times.items():
        eager = times.get((name, direction, "torch eager"))
        if implementation == "triton" and eager:
            yield [name, direction, cell(eager), cell(ours), f"{eager / ours:.2f}"]


def dcnv3(found: list[Row], folder: Path) -> str:
    """Every implementation beside the copy."""
    mine = of(found, "dcnv3")
    copy = next(r for r in mine if r["name"] == "copy")
    text = (
        f"## DCNv3\n\nA copy of {copy['bytes'] / 2**30:.3g} GiB moves {copy['gb_per_s']:.0f} GB/s."
    )
    text += "\n\n" + timed([r for r in mine if r.get("fraction_of_copy")])
    failed = [[r["name"], r["implementation"], r["error"]] for r in mine if not r["ok"]]
    if failed:
        text += "\n\n" + markdown(["problem", "not timed", "because"], failed)
    if plots.shares(mine, folder / "dcnv3.png"):
        text += "\n\n![share of copy](dcnv3.png)"
    return text


def timed(mine: list[Row]) -> str:
    """Table of checked and timed implementations."""
    lines = [
        [r["name"], r["direction"], r["implementation"], cell(r["error"]), cell(r["ms"]),
         cell(r["gb_per_s"]), f"{r['fraction_of_copy']:.0%}"]
        for r in mine
    ]  # fmt: skip
    titles = ["problem", "direction", "implementation", "error", "ms", "GB/s", "of copy"]
    return markdown(titles, lines) if lines else ""


def cell(value: Any) -> str:
    """A value for a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _list(seconds: list[float]) -> str:
    return ", ".join(f"{s:.2f}" for s in seconds)


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
