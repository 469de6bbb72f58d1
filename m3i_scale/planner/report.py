"""A plan as text, and a sweep over numbers of GPUs as a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from m3i_scale.config import Config, Optimizer
from m3i_scale.planner.estimate import USABLE, Plan
from m3i_scale.planner.state import activations
from m3i_scale.profiling.record import Trace

GIB = 2**30


class Length(NamedTuple):
    """How long the run is."""

    steps: int
    batch: int


def run_length(spec: Optimizer, epoch_samples: int | None) -> Length:
    """Optimiser steps of a run.

    Raises:
        ValueError: the length is stated in epochs and nobody said how many samples one has.
    """
    span = spec.duration
    if span.unit == "epochs" and epoch_samples is None:
        raise ValueError(
            f"optimizer.duration is {span}; say how many samples an epoch has, with --samples"
        )
    batch = spec.global_batch_size
    return Length(span.steps(batch=batch, epoch_samples=epoch_samples or 0), batch)


def describe(
    plan: Plan,
    traced: Trace,
    length: Length,
    remedies: Sequence[str],
    alternatives: Sequence[Plan] = (),
) -> str:
    """The whole plan; `alternatives` are the same in other ways to shard it, itself among them."""
    parts = (
        _head(plan, traced), _memory(plan, traced), _verdict(plan, remedies),
        _ways(plan, alternatives), _compute(plan), _traffic(plan), _time(plan, length),
        _assumptions(plan, traced),
    )  # fmt: skip
    return "\n".join("\n".join(part) + "\n" for part in map(list, parts) if part)


def _head(plan: Plan, traced: Trace) -> Iterator[str]:
    cluster, batch = plan.cluster, plan.batch
    trained = sum(w.elements for w in traced.weights if w.trained)
    frozen = sum(w.elements for w in traced.weights if not w.trained)
    kind = "averaged" if isinstance(plan.config, Config) else "frozen"
    others = f", {frozen / 1e6:,.1f} M {kind}" if frozen or kind == "averaged" else ""
    yield f"{plan.config.run}: {traced.title}, {trained / 1e6:,.1f} M parameters trained{others}"
    yield (
        f"{cluster.nodes} nodes x {cluster.per_node} {cluster.gpu.name}; batch {batch.batch:,} = "
        f"{batch.micro} x {batch.accumulation} accumulated x {cluster.ranks} GPUs"
    )


def _memory(plan: Plan, traced: Trace) -> Iterator[str]:
    yield f"{f'memory per GPU, {plan.config.engine.precision}':42s}{'GiB':>8s}"
    rows = plan.state | {f"{kind} (in a step)": size for kind, size in plan.passing.items()}
    yield from (_row(kind, size / GIB) for kind, size in rows.items() if size)
    yield _row("device context, libraries", plan.assumed.workspace / GIB)
    yield _row("at most", plan.peak_memory / GIB)
    for kind, size in plan.offloaded.items():
        yield _row(f"on the host: {kind}", size / GIB)
    if plan.held:
        yield _row("on the host: the batch, for two passes", plan.held / GIB)
    for name, checkpointed in (("with", True), ("without", False)):
        acts = activations(traced, checkpointed)
        size = (acts.kept + acts.inside) * plan.batch.micro / GIB
        yield _row(f"activations {name} checkpointing", size)


def _verdict(plan: Plan, remedies: Sequence[str]) -> Iterator[str]:
    usable = USABLE * plan.cluster.gpu.memory / GIB
    if plan.fits:
        yield f"It fits: {plan.peak_memory / GIB:.1f} of {usable:.1f} GiB that can be used."
        return
    yield (
        f"It does NOT fit: {plan.peak_memory / GIB:.1f} GiB are needed, {usable:.1f} can be used."
    )
    if remedies:
        yield f"What would fit: {'; or '.join(remedies)}."
    else:
        yield "No setting of this program would make it fit; take more GPUs, or larger ones."


def _ways(plan: Plan, alternatives: Sequence[Plan]) -> Iterator[str]:
    """What ZeRO's stages and the teacher's places need, and which of them is the fastest."""
    if len(alternatives) < 2:
        return
    column = "engine.teacher" if isinstance(plan.config, Config) else ""
    yield (
        f"{'engine.zero.stage':19s}{column}  GiB/GPU  fits  sent, GB  collectives  host, s  s/step"
    )
    for one in alternatives:
        sent = sum(traffic.sent for traffic in one.flow.traffic) / 1e9
        word = "as configured" if one is plan else ""
        place = one.config.engine.teacher.ljust(len(column)) if column else ""
        yield (
            f"  {one.config.engine.zero.stage:<17d}{place}"
            f"{one.peak_memory / GIB:9.1f}{'yes' if one.fits else 'NO':>6s}{sent:10.2f}"
            f"{one.flow.collectives:13,d}{one.on_host:9.2f}{one.step:8.2f}  {word}".rstrip()
        )
    fitting = [one for one in alternatives if one.fits]
    if fitting:
        best = min(fitting, key=lambda one: (one.step, one.on_host))
        engine = best.config.engine
        yield (
            f"Fastest of those that fit: engine.zero.stage={engine.zero.stage}"
            f"{f' {column}={engine.teacher}' if column else ''}"
            f"{' (as configured)' if best is plan else ''}; "
            "between equal steps the one that leaves Python more time."
        )


def _compute(plan: Plan) -> Iterator[str]:
    yield "FLOPs per sample            forward    backward  recomputed   (1e9)"
    for name, part in plan.flops.parts.items():
        yield f"  {name:22s}" + "".join(f"{value / 1e9:12,.1f}" for value in part)
    yield f"  model {plan.flops.model / 1e9:,.0f}, hardware {plan.flops.hardware / 1e9:,.0f}"


def _traffic(plan: Plan) -> Iterator[str]:
    yield "communication per step          full tensors, GB   sent by each GPU, GB"
    for traffic in plan.flow.traffic:
        yield f"  {traffic.name:42s}{traffic.size / 1e9:8.2f}{traffic.sent / 1e9:12.2f}"
    total = sum(traffic.sent for traffic in plan.flow.traffic)
    yield f"  {'in all':42s}{'':8s}{total / 1e9:12.2f}   ({plan.flow.collectives:,} collectives)"


def _time(plan: Plan, length: Length) -> Iterator[str]:
    rate = plan.batch.batch / plan.step
    yield (
        f"step {plan.step:.2f} s: {plan.computing:.2f} s computing, {plan.communicating:.2f} s "
        f"communicating in the background, {plan.on_host:.2f} s of Python on the host; "
        f"model FLOPs utilisation {100 * plan.utilisation:.0f} %"
    )
    if plan.limited_by_host:
        yield (
            f"Python is the limit: GPUs wait {plan.on_host - plan.on_device:.2f} s of every step. "
            "Larger micro-batches (optimizer.max_micro_batch) on fewer GPUs cost Python no more."
        )
    yield (
        f"stream {rate:,.0f} samples/s, {rate * plan.assumed.sample_bytes / 1e6:,.0f} MB/s in all, "
        f"{rate / plan.cluster.nodes:,.0f} samples/s and node"
    )
    yield f"{length.steps:,} steps: {days(plan, length):.1f} days"
    yield f"checkpoint {plan.checkpoint / 1e9:.1f} GB"


def _assumptions(plan: Plan, traced: Trace) -> Iterator[str]:
    assumed, unit = plan.assumed, plan.cluster.gpu
    yield "assumed"
    yield from (f"  {note}" for note in traced.notes)
    yield (
        f"  GPUs reach {100 * assumed.utilisation:.0f} % of {unit.peak / 1e12:,.0f} TFLOP/s while "
        "computing, recomputation included"
    )
    yield (
        f"  links: {unit.inside / 1e9:.0f} GB/s inside a node, {unit.across / 1e9:.0f} GB/s per "
        f"GPU between nodes, of which {100 * assumed.links:.0f} % are reached; "
        f"{assumed.latency * 1e6:.0f} us per collective x (1 + log2 nodes)"
    )
    yield (
        f"  communication hides behind {100 * assumed.overlap:.0f} % of computing; "
        "the rest is added"
    )
    work = plan.work
    rest = f"{work.tensors:,} tensors and {work.slices:,} slices of collectives"
    if work.gradients:
        rest = f"{work.gradients:,} gradients"
    yield (
        f"  Python visits {work.modules:,} modules, {rest} a step, at {assumed.host:g} x the "
        "seconds of a CPU run"
    )
    yield f"  {assumed.sample_bytes / 1e3:.0f} kB per sample; no waiting for data, no restarts"


def _row(name: str, value: float) -> str:
    return f"  {name:40s}{value:8.2f}"


def days(plan: Plan, length: Length) -> float:
    """Days to the end of the run."""
    return length.steps * plan.step / 86400


def scaling_table(plans: Sequence[Plan], length: Length) -> str:
    """One line per number of GPUs."""
    lines = [
        "  GPUs   micro x accumulated   GiB/GPU  fits   s/step  host, s   samples/s   MFU %    days"
    ]
    for plan in plans:
        rate = plan.batch.batch / plan.step
        lines.append(
            f"{plan.cluster.ranks:6d}{plan.batch.micro:8d} x {plan.batch.accumulation:<11d}"
            f"{plan.peak_memory / GIB:9.1f}{'yes' if plan.fits else 'NO':>6s}"
            f"{plan.step:9.2f}{plan.on_host:9.2f}{rate:12,.0f}"
            f"{100 * plan.utilisation:8.1f}{days(plan, length):8.1f}"
        )
    return "\n".join(lines) + "\n"


def scaling_plot(plans: Sequence[Plan], length: Length, path: Path) -> None:
    """Days and memory over the number of GPUs, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, space = figure.subplots(1, 2)
    gpus = [plan.cluster.ranks for plan in plans]
    time.plot(gpus, [days(plan, length) for plan in plans], "o-", label="planned")
    ideal = days(plans[0], length) * gpus[0]
    time.plot(gpus, [ideal / n for n in gpus], ":", color="grey", label="in proportion to GPUs")
    python = [length.steps * plan.on_host / 86400 for plan in plans]
    time.plot(gpus, python, "--", label="Python alone")
    time.set(xscale="log", yscale="log", ylabel="days to the end")
    kinds = {
        "state": [sum(plan.state.values()) for plan in plans],
        "in a step": [max(sum(p.passing.values()), p.update) for p in plans],
        "context, libraries": [plan.assumed.workspace for plan in plans],
    }
    positions = range(len(plans))
    below = [0.0] * len(plans)
    for name, sizes in kinds.items():
        space.bar(positions, [s / GIB for s in sizes], bottom=below, label=name)
        below = [b + s / GIB for b, s in zip(below, sizes, strict=True)]
    usable = USABLE * plans[0].cluster.gpu.memory / GIB
    space.axhline(usable, color="black", linestyle="--", label="can be used")
    space.set_xticks(list(positions), [str(n) for n in gpus])
    space.set(ylabel="GiB per GPU", ylim=(0, 1.4 * max(usable, max(below))))  # room for the legend
    time.set_xticks(gpus, [str(n) for n in gpus], rotation=60)
    time.minorticks_off()
    for axes in (time, space):
        axes.set_xlabel(f"GPUs ({plans[0].cluster.gpu.name})")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
