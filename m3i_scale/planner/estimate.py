"""What a run needs, before it starts: memory, communication, time, data. `m3i plan` prints it.

Nothing is run but one pass on fake tensors (`trace`) and a replay of what ZeRO-3 gathers
(`zero3_replay`); state and traffic follow from how the engine shards (`zero`, `momentum`). Stages 1
and 2 of ZeRO are the subject of `flat`.
Memory and traffic are compared with real ranks in tests/planner/test_estimate.py; times rest on the
`Assumptions`, which are printed with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from m3i_scale.config import Config, Gaussian, RunConfig
from m3i_scale.config.transfer import TransferRun
from m3i_scale.engine import memory
from m3i_scale.engine.schedules import BatchSplit, split_batch
from m3i_scale.engine.zero import deepspeed_config
from m3i_scale.integrations.frozen import make_skeletons
from m3i_scale.planner import flat, host, two_passes
from m3i_scale.planner.gpus import Gpu
from m3i_scale.planner.sizes import Flow, Traffic, Widths, averaged_weights, shard
from m3i_scale.planner.state import activations, lasting_memory, owned_elements, refresh_size
from m3i_scale.planner.zero3_replay import Gathers, Replay, Settings, uses
from m3i_scale.profiling.flops import Flops, flops_of, mean_flops
from m3i_scale.profiling.record import Trace
from m3i_scale.profiling.trace import trace

USABLE = 0.95  # of a GPU's memory; the driver and fragments have the rest
# Bytes of a stored image: of image-text pairs as they are stored for training at 192 pixels, of
# ImageNet-1k, COCO's train2017, and ADE20k with its mask.
SAMPLE_BYTES = {
    "pretraining": 30_000,
    "classification": 110_000,
    "detection": 160_000,
    "segmentation": 50_000,
}


class Cluster(NamedTuple):
    """GPUs and how they are connected."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        """One process per GPU."""
        return self.nodes * self.per_node


class Assumptions(NamedTuple):
    """What is not derived; printed with every plan."""

    # Of the peak, by what is really computed, while computing: 0.213 of an H100 by InternImage-H at
    # micro-batch 128 (docs/plan.md).
    utilisation: float = 0.21
    links: float = 0.75  # of a link's bandwidth, by large collectives
    overlap: float = 0.70  # of the computing time that can hide communication
    latency: float = 20e-6  # seconds per collective, times 1 + log2(nodes)
    # Times `host.SECONDS`: 1.4 to 1.7 on the host of an H100, launching included (docs/plan.md).
    host: float = 1.5
    workspace: float = 2.5e9  # bytes: device context, NCCL, cuBLAS, cuDNN
    sample_bytes: float = SAMPLE_BYTES["pretraining"]


@dataclass(frozen=True)
class Plan:
    """Everything about one configuration on one cluster."""

    config: RunConfig
    cluster: Cluster
    assumed: Assumptions
    batch: BatchSplit
    checkpointed: bool | None
    state: dict[str, float]  # bytes per GPU, as `memory.held_memory` measures them
    offloaded: dict[str, float]  # bytes per GPU in the host's memory
    held: float  # bytes per GPU in the host's memory: the batch, where it is read twice
    passing: dict[str, float]  # bytes per GPU that live during a step
    update: float  # bytes per GPU of temporaries in the update, or where samples are compared
    waiting_parameters: float  # bytes per GPU, gathered, between forward and backward
    flow: Flow
    flops: Flops  # the mean over steps
    sizes: tuple[tuple[float, Flops], ...]  # of steps of one size of images, with their shares
    work: host.Work  # of the host
    checkpoint: float  # bytes on disk

    @property
    def peak_memory(self) -> float:
        """Bytes per GPU at the worst moment of a step."""
        worst = max(sum(self.passing.values()), self.update)
        return sum(self.state.values()) + worst + self.assumed.workspace

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory holds it."""
        return self.peak_memory <= USABLE * self.cluster.gpu.memory

    @property
    def computing(self) -> float:
        """Seconds of a step in which the GPUs compute."""
        share = self.batch.batch / self.cluster.ranks
        return self.flops.hardware * share / (self.cluster.gpu.peak * self.assumed.utilisation)

    @property
    def communicating(self) -> float:
        """Seconds of a step in which collectives run."""
        cluster, assumed = self.cluster, self.assumed
        latency = assumed.latency * (1 + math.log2(cluster.nodes))
        moving = sum(_seconds(t, cluster, assumed) for t in self.flow.traffic)
        return self.flow.collectives * latency + moving

    @property
    def on_device(self) -> float:
        """Seconds of a step in which GPUs compute, or wait for their links."""
        return sum(share * self._on_device(flops) for share, flops in self.sizes)

    def _on_device(self, flops: Flops) -> float:
        computing = self.computing * flops.hardware / self.flops.hardware
        return computing + max(0.0, self.communicating - self.assumed.overlap * computing)

    @property
    def on_host(self) -> float:
        """Seconds of a step that Python needs to launch it."""
        return self.assumed.host * host.seconds(self.work)

    @property
    def step(self) -> float:
        """Seconds of a step: the host runs ahead of the device, or the device waits for it."""
        return sum(share * max(self._on_device(f), self.on_host) for share, f in self.sizes)

    @property
    def limited_by_host(self) -> bool:
        """Whether GPUs wait for Python."""
        return self.on_host > self.on_device

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: what the method needs, over what the peak would allow."""
        needed = self.flops.model * self.batch.batch / self.cluster.ranks
        return needed / (self.cluster.gpu.peak * self.step)


def trace_of(config: Config, *, kernels: bool = False) -> Trace:
    """What `trace` finds out about a configuration's networks; `kernels` as there.

    At the largest size of `data.mixed_sizes`; `Trace.smaller` has the others.
    """
    skeletons, precision = make_skeletons(config), config.engine.precision

    def at(size: int) -> Trace:
        return trace(
            config.model, config.objective, size, skeletons, precision=precision, kernels=kernels
        )

    *smaller, largest = config.data.sizes
    found = at(largest)
    found.smaller = [(config.data.sizes[size], at(size)) for size in smaller]
    if smaller:
        shares = ", ".join(f"{100 * s:.3g} % at {n}" for n, s in config.data.sizes.items())
        found.title = f"{config.model.backbone.name}, {shares} pixels"
        found.notes = (
            *found.notes, f"memory is that of a step at {largest} pixels, FLOPs and time the mean",
        )  # fmt: skip
    return found


def make_plan(
    config: RunConfig,
    traced: Trace,
    cluster: Cluster,
    assumed: Assumptions = Assumptions(),  # noqa: B008  immutable
    *,
    checkpointed: bool | None = None,
) -> Plan:
    """Plan a configuration on a cluster.

    Args:
        config: the whole of it.
        traced: what `trace_of`, or its task (`TransferTask.trace`), found out about its networks.
        cluster: where it is to run.
        assumed: figures that are not derived.
        checkpointed: all blocks or none; None as configured.

    Raises:
        ConfigError: the batch cannot be spread over that many GPUs.
    """
    spec, pairs = config.optimizer, isinstance(config, Config)
    batch = split_batch(spec.global_batch_size, spec.max_micro_batch, cluster.ranks, even=pairs)
    engine, whole = config.engine, config.engine.teacher == "whole"
    deepspeed = deepspeed_config(engine, batch, clip_norm=spec.clip_norm)
    widths = Widths.of(engine.precision, deepspeed)
    frozen = sum(encoder.elements for encoder in traced.frozen.values())
    keeps_average = isinstance(config, TransferRun) and config.optimizer.average is not None
    state, offloaded = lasting_memory(
        engine, traced.weights, cluster.ranks, deepspeed, frozen,
        averaged=keeps_average, moments=spec.moments,
    )  # fmt: skip
    flow = step_flow(config, traced, cluster.ranks, batch, deepspeed, checkpointed=checkpointed)
    acts = activations(traced, checkpointed)
    trained = sum(w.elements for w in traced.weights if w.trained)
    averaged = sum(w.elements for w in averaged_weights(traced.weights)) + keeps_average * trained
    passing = {
        "activations": acts.kept * batch.micro,
        "block being recomputed": acts.inside * batch.micro,
        memory.GATHERED: flow.live * widths.compute,
    }
    if traced.running:
        passing["frozen backbone, running"] = traced.running * batch.micro
    wait = two_passes.waiting(config, traced, cluster.ranks, batch)
    kept = {"embeddings of the batch": wait.embeddings, "teacher's encodings": wait.encodings}
    passing |= {name: size for name, size in kept.items() if size}
    twice = config if two_passes.runs_twice(config, batch) else None
    sizes = [*traced.smaller, (1 - sum(share for share, _ in traced.smaller), traced)]
    counted = [two_passes.with_first_pass(flops_of(t), twice) if twice else flops_of(t)
               for _, t in sizes]  # fmt: skip
    shares = [share for share, _ in sizes]
    first_visits = two_passes.first_pass_visits(twice, traced) if twice else 0
    if engine.zero.stage == 3:
        bucket = min(int(deepspeed["zero_optimization"]["reduce_bucket_size"]), trained)
        group = int(deepspeed["zero_optimization"].get("sub_group_size", 1e9))
        owned = owned_elements(engine, traced.weights, cluster.ranks, widths)
        reducing: dict[str, float] = {"gradients being reduced": bucket * widths.reduced}
        update: float = 0 if offloaded else min(group, owned) * widths.master
    else:
        reducing = flat.gradient_memory(
            traced.weights, engine.zero.stage, cluster.ranks, batch, widths, deepspeed
        )
        update = flat.update_memory(traced.weights, cluster.ranks, widths)
    gathers = whole and engine.zero.stage == 3
    refresh = refresh_size(traced.weights, cluster.ranks, whole=gathers)
    return Plan(
        config=config,
        cluster=cluster,
        assumed=assumed,
        batch=batch,
        checkpointed=checkpointed,
        state=state,
        offloaded=offloaded,
        held=two_passes.held(config, batch),
        passing=passing | reducing,
        update=max(update, refresh * widths.compute, sum(wait)),
        flow=flow,
        waiting_parameters=flow.waiting * widths.compute,
        flops=mean_flops(shares, counted),
        sizes=tuple(zip(shares, counted, strict=True)),
        work=host.step_work(
            traced,
            ranks=cluster.ranks,
            accumulation=batch.accumulation,
            collectives=flow.collectives,
            whole_teacher=whole,
            checkpointed=checkpointed,
            first_pass=first_visits,
            stage=engine.zero.stage,
        ),
        checkpoint=(1 + spec.moments) * trained * widths.master + 4 * averaged,
    )


# -------------------------------------------------------------------------------------------- links


def step_flow(
    config: RunConfig,
    traced: Trace,
    ranks: int,
    batch: BatchSplit,
    deepspeed: dict[str, Any],
    *,
    checkpointed: bool | None = None,
) -> Flow:
    """Collectives of one optimiser step.

    Flags, norms and figures, some hundred bytes a step, are left out.
    """
    if ranks == 1:
        return Flow([])
    if config.engine.zero.stage < 3:
        widths = Widths.of(config.engine.precision, deepspeed)
        moving = flat.step_flow(
            traced.weights, config.engine.zero.stage, ranks, batch, widths, deepspeed
        )
        losses = _contrast(config, traced, ranks, batch)
        return moving._replace(traffic=[*moving.traffic, *(t for t in losses if t.size)])
    settings, widths = Settings.of(deepspeed), Widths.of(config.engine.precision, deepspeed)
    hpz = deepspeed["zero_optimization"]["zero_hpz_partition_size"]
    whole = config.engine.teacher == "whole"
    weights = [w for w in traced.weights if not (whole and w.of_teacher)]
    steps = uses(traced, checkpointed=checkpointed, teacher=not whole)
    replay = Replay(weights, steps, settings, traced=traced, hpz=hpz > 1)
    small = {w.name: w.elements for w in weights if w.elements <= settings.persistence_threshold}
    # Gathered by the first micro-step, small parameters stay until the update.
    first, later = replay.micro_step(set()), replay.micro_step(set(small))
    kept = sum(small.values()) if batch.accumulation > 1 else 0
    times = batch.accumulation - 1
    found: list[Traffic] = []

    def gather(name: str, sizes: Counter[int], group: int, local: bool) -> None:
        size = sum(n * group * shard(e, group) for e, n in sizes.items()) * widths.compute
        found.append(Traffic(f"all-gather, {name}", size, size * (group - 1) / group, local))

    for phase in ("teacher", "forward", "backward"):
        sizes, inside = (
            Counter({e: one[e] + times * more[e] for e in one | more})
            for one, more in (
                (first.elements[phase], later.elements[phase]),
                (first.local[phase], later.local[phase]),
            )
        )
        gather(phase, sizes, ranks, local=False)
        gather(f"{phase}, inside nodes", inside, hpz, local=True)
    again = Gathers()
    if two_passes.runs_twice(config, batch):
        first_uses = two_passes.first_pass_uses(config, steps)
        again = Replay(weights, first_uses, settings, traced=traced, hpz=hpz > 1).micro_step(
            set(small)
        )
        sizes, inside = (
            Counter({e: batch.accumulation * n for e, n in counts["forward"].items()})
            for counts in (again.elements, again.local)
        )
        gather("first pass", sizes, ranks, local=False)
        gather("first pass, inside nodes", inside, hpz, local=True)
    refreshed = refresh_size(traced.weights, ranks, whole=whole)
    gather("teacher after the update", Counter(), ranks, local=False)
    size = refreshed * widths.compute
    found[-1] = found[-1]._replace(size=size, sent=size * (ranks - 1) / ranks)

    reduced = sum(ranks * shard(w.elements, ranks) for w in traced.weights if w.trained)
    size = batch.accumulation * reduced * widths.reduced
    found.append(
        Traffic("reduce-scatter, gradients", size, size * (ranks - 1) / ranks, local=False)
    )
    found += _contrast(config, traced, ranks, batch)
    bucket = int(deepspeed["zero_optimization"]["reduce_bucket_size"])
    buckets = batch.accumulation * math.ceil(reduced / bucket)
    collectives = first.collectives + times * later.collectives + buckets + bool(refreshed)
    collectives += batch.accumulation * again.collectives
    return Flow(
        [t for t in found if t.size],
        collectives,
        max(first.live, later.live + kept),
        max(first.at_turn, later.at_turn),
    )


def _contrast(config: RunConfig, traced: Trace, ranks: int, batch: BatchSplit) -> Iterator[Traffic]:
    """Targets that are gathered from all ranks to be told apart, and their gradients."""
    if not isinstance(config, Config):
        return
    model, objective = config.model, config.objective
    gathered = reduced = 0.0
    texts = False  # were gathered for another group
    for target in objective.targets:
        likelihood = target.likelihood
        if isinstance(likelihood, Gaussian) or likelihood.candidates != "global":
            continue
        if target.representation == "category":
            continue
        rows = ranks * batch.micro * batch.accumulation * (traced.tokens if target.dense else 1)
        size = 4 * rows * two_passes.target_width(model, traced, target)
        text = target.representation == "text"  # image targets carry no gradient
        shared = text and texts and not objective.runs_twice(batch.accumulation)
        once = 0 if shared else 1
        both = target.both_directions
        gathered += once * (size + rows) + size * both
        reduced += size * (once * text + both)
        texts = texts or text
    share = (ranks - 1) / ranks
    yield Traffic("all-gather, targets of the softmax", gathered, gathered * share, local=False)
    yield Traffic("reduce-scatter, their gradients", reduced, reduced * share, local=False)


def _seconds(traffic: Traffic, cluster: Cluster, assumed: Assumptions) -> float:
    """All GPUs of a node send through their own port: a node's ports work side by side."""
    inside = traffic.sent / cluster.gpu.inside
    if traffic.local or cluster.nodes == 1:
        return inside / assumed.links
    across = traffic.sent / (cluster.gpu.across * cluster.per_node)
    return max(inside, across) / assumed.links
