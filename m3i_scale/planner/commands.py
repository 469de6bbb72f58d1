"""`m3i plan`: what a run needs, before it starts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from m3i_scale.arguments import count, local_path, positive, share
from m3i_scale.config import Config, ConfigError, RunConfig
from m3i_scale.config.load import load_run
from m3i_scale.config.tasks import TASKS
from m3i_scale.paths import require_writable
from m3i_scale.planner.gpus import GPUS, gpu

DESCRIPTION = """Plan a run: memory, communication, FLOPs, time and data of a configuration on GPUs.

Needs no GPU. Memory and communication follow from how the engine works; times rest on the
assumptions printed with them. With --sweep also a table (and with --out a plot) over GPU counts."""


def register(commands: Any) -> None:
    """Add the command to an `ArgumentParser.add_subparsers()`."""
    from m3i_scale.planner.estimate import SAMPLE_BYTES, Assumptions

    default = Assumptions()
    parser = commands.add_parser(
        "plan",
        help="memory, communication, time and data of a run, before it starts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (%(default)s)")
    parser.add_argument("--nodes", type=count, default=1, help="(%(default)s)")
    parser.add_argument("--gpus-per-node", type=count, default=8, help="(%(default)s)")
    parser.add_argument(
        "--samples", type=count, metavar="N", help="in one epoch, where the length is in epochs"
    )
    parser.add_argument(
        "--sweep", metavar="N,N,...", help="numbers of GPUs, multiples of --gpus-per-node"
    )
    parser.add_argument(
        "--out", type=local_path, metavar="FOLDER", help="for plan.txt and scaling.png"
    )
    parser.add_argument(
        "--utilisation", type=share, default=default.utilisation, metavar="SHARE",
        help="of the peak, reached while computing (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--host-factor", type=positive, default=default.host, metavar="X",
        help="Python's seconds, launching of kernels included, over those that were measured on a "
        "CPU core (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--network", type=positive, metavar="GBYTE_S", help="between nodes, per GPU (by GPU kind)"
    )
    parser.add_argument(
        "--sample-bytes", type=positive, metavar="N",
        help="of a stored image with its caption or labels (by task: "
        f"{', '.join(f'{name} {size}' for name, size in SAMPLE_BYTES.items())})",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="changes to the file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`m3i plan`."""
    from m3i_scale.planner.estimate import SAMPLE_BYTES, Assumptions, Cluster, make_plan
    from m3i_scale.planner.report import describe, run_length, scaling_plot, scaling_table

    config = load_run(options.config, options.overrides)
    counts = _node_counts(options.sweep, options.gpus_per_node) if options.sweep is not None else []
    if options.out:
        require_writable(options.out)
    unit = gpu(options.gpu)
    if options.network:
        unit = unit._replace(across=options.network * 1e9)
    length = run_length(config.optimizer, options.samples)
    assumed = Assumptions(
        utilisation=options.utilisation,
        host=options.host_factor,
        sample_bytes=options.sample_bytes or SAMPLE_BYTES[_name(config)],
    )
    traced = _traced(config)
    cluster = Cluster(unit, options.nodes, options.gpus_per_node)

    def planned(nodes: int) -> Any:
        try:
            return make_plan(config, traced, cluster._replace(nodes=nodes), assumed)
        except ConfigError as error:
            ranks = f"--nodes {nodes} x --gpus-per-node {cluster.per_node}"
            raise ConfigError(f"{error} (ranks are {ranks})") from None

    plan = planned(options.nodes)
    advice = [] if plan.fits else list(remedies(config, traced, plan))
    text = describe(plan, traced, length, advice, alternatives(config, traced, plan))
    if counts:
        plans = [planned(nodes) for nodes in counts]
        text += "\n" + scaling_table(plans, length)
    print(text, end="")
    if options.out:
        (options.out / "plan.txt").write_text(text)
        if counts:
            scaling_plot(plans, length, options.out / "scaling.png")
    return 0


def _name(config: RunConfig) -> str:
    return next(name for name, kind in TASKS.items() if isinstance(config, kind))


def _traced(config: RunConfig) -> Any:
    """What a pass of the networks shows; a transfer task says what its pass is."""
    kernels = config.engine.kernels != "reference"
    if isinstance(config, Config):
        from m3i_scale.planner.estimate import trace_of

        return trace_of(config, kernels=kernels)
    from m3i_scale.tasks import task_of
    from m3i_scale.tasks.transfer import TransferTask

    task = task_of(config)
    assert isinstance(task, TransferTask)
    return task.trace(kernels=kernels)


def alternatives(config: RunConfig, traced: Any, plan: Any) -> list[Any]:
    """The same plan with each of ZeRO's stages, and at stage 3 the teacher in both its places.

    The plan itself is among them. States that are offloaded, or copies on nodes (hpZ), need stage
    3; a teacher has one place on a single rank, and only pre-training has one.
    """
    from m3i_scale.planner.estimate import make_plan

    zero, place = config.engine.zero, config.engine.teacher
    stages = (3,) if zero.offload_optimizer or zero.hpz_partition > 1 else (1, 2, 3)
    choices = [(stage, "whole" if isinstance(config, Config) else place) for stage in stages]
    if isinstance(config, Config) and config.objective.has_teacher and plan.cluster.ranks > 1:
        choices.append((3, "sharded"))
    if (zero.stage, place) not in choices:
        choices.append((zero.stage, place))
    return [
        plan
        if choice == (zero.stage, place)
        else make_plan(_elsewhere(config, *choice), traced, plan.cluster, plan.assumed)
        for choice in choices
    ]


def remedies(config: RunConfig, traced: Any, plan: Any) -> Iterator[str]:
    """Changes, smallest first, each of which alone or together makes the plan fit."""
    from m3i_scale.planner.estimate import make_plan

    def fits(changed: RunConfig, checkpointed: bool | None, cluster: Any = plan.cluster) -> bool:
        return make_plan(changed, traced, cluster, plan.assumed, checkpointed=checkpointed).fits

    pairs = isinstance(config, Config)
    yield from _another_way(config, traced, plan)
    all_recomputed = all(block.recomputed for block in traced.blocks)
    options = [(None, "")] if all_recomputed else [(None, ""), (True, f"{traced.checkpointing}, ")]
    needed = "" if config.engine.zero.stage == 3 else "engine.zero.stage=3, "
    offload_words = f"{needed}engine.zero.offload_optimizer=true, "
    offloaded = _changed(config, zero={"offload_optimizer": True, "stage": 3})
    for checkpointed, words in options:
        if words and fits(config, checkpointed):
            yield f"{words.rstrip(', ')}{' for all networks' if pairs else ''}"
        for changed, offload in ((config, ""), (offloaded, offload_words)):
            micro = _largest_micro_batch(plan, lambda c, k=checkpointed: fits(c, k), changed)
            if micro:
                yield f"{words}{offload}optimizer.max_micro_batch={micro}"
                break
    for factor in (2, 4, 8, 16):
        cluster = plan.cluster._replace(nodes=plan.cluster.nodes * factor)
        try:
            if fits(config, None, cluster):
                yield f"{cluster.nodes} nodes"
                return
        except ConfigError:
            continue


def _another_way(config: RunConfig, traced: Any, plan: Any) -> Iterator[str]:
    """The first way to shard it that fits, in words of the command line."""
    for other in alternatives(config, traced, plan):
        if other.fits:
            yield " ".join(_differences(config, other.config))
            return


def _largest_micro_batch(plan: Any, fits: Any, config: RunConfig) -> int | None:
    share = config.optimizer.global_batch_size // plan.cluster.ranks
    step = 2 if isinstance(config, Config) else 1  # pre-training mixes pairs
    sizes = (m for m in range(plan.batch.micro, 0, -1) if m % step == 0 and share % m == 0)
    return next((m for m in sizes if fits(_changed(config, max_micro_batch=m))), None)


def _elsewhere(config: RunConfig, stage: int, teacher: str) -> RunConfig:
    zero = config.engine.zero.model_copy(update={"stage": stage})
    engine = config.engine.model_copy(update={"teacher": teacher, "zero": zero})
    return config.model_copy(update={"engine": engine})


def _differences(config: RunConfig, other: RunConfig) -> Iterator[str]:
    """What to say on the command line to get the one from the other."""
    if other.engine.zero.stage != config.engine.zero.stage:
        yield f"engine.zero.stage={other.engine.zero.stage}"
    if other.engine.teacher != config.engine.teacher:
        yield f"engine.teacher={other.engine.teacher}"


def _changed(
    config: RunConfig, *, zero: dict[str, Any] | None = None, **optimizer: Any
) -> RunConfig:
    engine = config.engine
    changed = engine.model_copy(update={"zero": engine.zero.model_copy(update=zero or {})})
    optimiser = config.optimizer.model_copy(update=optimizer)
    return config.model_copy(update={"engine": changed, "optimizer": optimiser})


def _node_counts(text: str, per_node: int) -> list[int]:
    try:
        gpus = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--sweep {text}: write numbers of GPUs, for instance 8,16,32") from None
    odd = [n for n in gpus if n < 1 or n % per_node]
    if odd:
        raise ValueError(f"--sweep: {odd[0]} GPUs are no whole nodes of {per_node} GPUs")
    return [n // per_node for n in gpus]
