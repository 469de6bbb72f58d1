"""Measure the real training step on synthetic data, on however many GPUs there are.

    deepspeed benchmarks/step.py --config configs/pretrain_internimage_h.yaml
    deepspeed benchmarks/step.py --config ... --micro-batch 64 model.backbone.name=intern_image_b

The step is that of `m3i_scale/engine/loop.py`: augmentation and mixing, teacher targets, forward,
backward, ZeRO-3, AdamW, momentum update; only the data are drawn instead of read. Prints and writes
images per second, TFLOP/s, the share of the dense bf16 peak (MFU), peak memory, and a table of
where the time goes. Also starts by torchrun, srun or plain python, and on CPUs.

Exit codes: 0 measured; 2 something is wrong and the last line says what; 3 out of GPU memory.
"""

import argparse
import contextlib
import csv
import datetime
import functools
import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import synthetic
import timeline
import torch
import torch.distributed as dist
from m3i_kernels import set_backend, set_dcnv3_algorithm
from m3i_kernels.dcnv3 import choice
from torch.profiler import ProfilerActivity, profile, record_function

from m3i_scale.cluster import launch
from m3i_scale.cluster.launch import World
from m3i_scale.cluster.numerics import CUBLAS
from m3i_scale.config import Config, Verify, load_config
from m3i_scale.integrations.frozen import make_skeletons
from m3i_scale.profiling.flops import mean_flops, run_flops
from m3i_scale.profiling.peaks import dense_bf16_peak

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).parent / "results"
OUT_OF_MEMORY = 3


class StepTiming(NamedTuple):
    """One measurement. FLOPs are those the method needs; "hardware" adds recomputed blocks."""

    run: str
    device: str
    ranks: int
    precision: str
    image_size: int
    micro_batch: int
    accumulation: int
    steps: int
    images_per_second: float
    step_ms_p10: float
    step_ms_p50: float
    step_ms_p90: float
    gflops_per_image: float
    tflops_per_device: float
    hardware_tflops_per_device: float
    mfu: float | None
    peak_memory_gib: float
    overrides: str
    torch: str
    triton: str
    deepspeed: str
    commit: str
    date: str


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except torch.OutOfMemoryError as error:
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return OUT_OF_MEMORY
    except Exception as error:
        if not getattr(error, "for_users", False):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def run(options: argparse.Namespace) -> int:
    """Build, warm up, time, profile, report."""
    config = load_config(options.config, options.overrides)
    spec = config.engine
    if options.twice:  # also where the configuration computes no step twice
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)
    world = launch.start(spec.device, spec.precision, config.seed, spec.timeout_minutes)
    launch.setup_logging(world.rank)
    config = _for_measurement(config, options, world)
    set_backend(config.engine.kernels)
    if options.cubins:
        sys.path.insert(0, str(ROOT / "kernels" / "bench"))
        import cubins

        cubins.install(options.cubins)
    stem = options.out / f"step_{config.run}"
    diary = Diary(stem.with_suffix(".json"), world)
    step, ready = build(config, world)
    diary.note(built=True)
    for _ in range(options.warmup):
        diary.note(warmup=[*diary.values.get("warmup", []), timed(step, world.device)])
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, world.device) for _ in range(options.steps)]
    diary.note(steps=seconds, dcnv3=choice.reported())
    row = summarise(config, options, world, ready.split.accumulation, seconds)
    diary.note(row=row._asdict())
    _write(row, None, stem, world)
    if options.profile:
        events = profiled(step, ready, options.profile, stem)
        if world.is_main:
            ran = timeline.kernels(events)
            diary.note(kernels=[k._asdict() for k in ran[:30]], kernel_ms=_total(ran))
            _write(row, timeline.tabulate(events), stem, world)
    if options.twice:
        found, events = computed_twice(step, ready, options.twice, stem)
        diary.note(twice=found)
        ran = timeline.kernels(events)
        diary.note(twice_kernels=[k._asdict() for k in ran[:10]], twice_kernel_ms=_total(ran))
    if options.gather_steps:
        set_dcnv3_algorithm("gather")
        timed(step, world.device)  # compiles
        again = [timed(step, world.device) for _ in range(options.gather_steps)]
        diary.note(gather_steps=again)
    if world.is_main:
        print(stem.with_suffix(".md").read_text(), flush=True)
    launch.finish()
    return 0


class Diary:
    """What is known so far, in a JSON file: a run that is stopped has not measured for nothing."""

    def __init__(self, path: pathlib.Path, world: World) -> None:
        self.values: dict[str, Any] = {}
        self._path = path if world.is_main else None
        self._started = time.perf_counter()

    def note(self, **values: Any) -> None:
        """Add values, and the seconds since the start at which they were known."""
        self.values |= values
        passed = {name: time.perf_counter() - self._started for name in values}
        self.values["known_after"] = self.values.get("known_after", {}) | passed
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.values, indent=1))


def _write(row: StepTiming, table: timeline.Table | None, stem: pathlib.Path, world: World) -> None:
    if world.is_main:
        with stem.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file).writerows([row._fields, row])
        stem.with_suffix(".md").write_text(describe(row, table))


def _total(ran: list[timeline.Kernel]) -> float:
    return sum(kernel.milliseconds for kernel in ran)


def build(config: Config, world: World) -> tuple[Callable[[], None], Any]:
    """The training run of `config`, and a function that makes its next step."""
    # After `launch.start`: they import deepspeed.
    from m3i_scale.engine import loop, session
    from m3i_scale.tasks.pretraining import Pretraining

    stream = synthetic.SyntheticStream(config)
    ready = session.open_run(
        Pretraining(config),
        world,
        stream,
        epoch_samples=stream.epoch_samples,
        resume="never",
        write=False,  # the run of that name, if there is one, is not touched
    )
    batches = loop.open_batches(ready)

    def step() -> None:
        with record_function(timeline.STEP):
            loop.train_step(ready, batches)

    return step, ready


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def computed_twice(
    step: Callable[[], None], ready: Any, steps: int, stem: pathlib.Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seconds and memory of steps that are computed twice, and how many were equal bit for bit.

    And the events of one more under the profiler, on rank 0.
    """
    from m3i_scale.engine import loop

    checks = loop.open_checks(ready, Verify(every=1))
    if ready.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, ready.world.device) for _ in range(steps)]
    found = {
        "seconds": seconds,
        "peak_memory_gib": _peak_memory(ready.world.device) / 2**30,
        "problem": str(checks.problem or ""),
        **checks.values(0),
    }
    events = profiled(step, ready, 1, stem.with_name(f"{stem.name}_twice"))
    ready.checks = None  # the next step opens those of the configuration
    return found, events


def profiled(
    step: Callable[[], None], ready: Any, steps: int, stem: pathlib.Path
) -> list[dict[str, Any]]:
    """Profile some more steps on rank 0 and keep the trace; its events, none on other ranks."""
    world = ready.world
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        stack.enter_context(annotated(ready))
        if world.is_main:
            recorder = stack.enter_context(profile(activities=activities))
        for _ in range(steps):
            step()
    if not world.is_main:
        return []
    trace = stem.with_suffix(".trace.json.gz")
    recorder.export_chrome_trace(str(trace))
    return timeline.read_trace(trace)


@contextlib.contextmanager
def annotated(ready: Any) -> Iterator[None]:
    """Mark the phases of a step in the profiler's trace; what is in none of them is the input."""
    sharded = ready.sharded
    engine, model, teacher = sharded.engine, sharded.model, sharded.teacher
    marks = [
        (model, "target_outputs", timeline.TARGETS),
        (engine, "forward", timeline.FORWARD),
        (engine, "backward", timeline.BACKWARD),
        (engine, "step", timeline.OPTIMISER),
    ]
    if teacher is not None:
        marks.append((teacher, "update", timeline.TEACHER))
    for owner, name, phase in marks:
        setattr(owner, name, _within(getattr(owner, name), timeline.PHASE + phase))
    try:
        yield
    finally:
        for owner, name, _ in marks:
            delattr(owner, name)  # the method of the class shows again


def _within(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return call


def summarise(
    config: Config,
    options: argparse.Namespace,
    world: World,
    accumulation: int,
    seconds: list[float],
) -> StepTiming:
    """The row of the slowest rank's memory and of this rank's times (steps end together)."""
    import deepspeed
    import triton

    from m3i_scale.engine.metrics import git_commit

    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    images = config.optimizer.global_batch_size * len(seconds) / sum(seconds)
    skeletons = make_skeletons(config)
    counted = run_flops(config, skeletons)
    flops = mean_flops(config.data.sizes.values(), counted.values())
    rate = images * flops.model / world.size
    # The peak is that of half-precision products; nothing else can be a share of it.
    peak = dense_bf16_peak(name) if config.engine.precision != "fp32" else None
    p10, p50, p90 = _quantiles([1e3 * s for s in seconds])
    return StepTiming(
        run=config.run,
        device=name,
        ranks=world.size,
        precision=config.engine.precision,
        image_size=config.data.image_size,
        micro_batch=config.optimizer.max_micro_batch,
        accumulation=accumulation,
        steps=len(seconds),
        images_per_second=images,
        step_ms_p10=p10,
        step_ms_p50=p50,
        step_ms_p90=p90,
        gflops_per_image=flops.model / 1e9,
        tflops_per_device=rate / 1e12,
        hardware_tflops_per_device=rate * flops.hardware / flops.model / 1e12,
        mfu=rate / peak if peak else None,
        peak_memory_gib=_peak_memory(world.device) / 2**30,
        overrides=" ".join(options.overrides),
        torch=torch.__version__,
        triton=triton.__version__,
        deepspeed=deepspeed.__version__,
        commit=git_commit() or "unknown",
        date=datetime.date.today().isoformat(),
    )


def describe(row: StepTiming, table: timeline.Table | None) -> str:
    """The measurement in Markdown."""
    mfu = f"{row.mfu:.1%} of the dense bf16 peak" if row.mfu else "no share of a known bf16 peak"
    memory = "of the process" if row.device == "cpu" else "allocated, GPU"
    lines = [
        f"# Training step: {row.run}",
        "",
        f"{row.ranks} x {row.device}, {row.precision}, {row.image_size} pixels, "
        f"{row.micro_batch} images x {row.accumulation} accumulated per device, {row.steps} steps.",
        "",
        f"- {row.images_per_second:.1f} images/s; step {row.step_ms_p50:.1f} ms "
        f"(10 to 90 %: {row.step_ms_p10:.1f} to {row.step_ms_p90:.1f})",
        f"- {row.tflops_per_device:.3g} TFLOP/s per device, {mfu} "
        f"({row.hardware_tflops_per_device:.3g} with what checkpointing computes again)",
        f"- {row.gflops_per_image:.3g} GFLOP per image, forward and backward of everything",
        f"- peak memory {row.peak_memory_gib:.2f} GiB ({memory}; the fullest rank)",
        f"- torch {row.torch}, triton {row.triton}, deepspeed {row.deepspeed}, commit "
        f"{row.commit}, {row.date}",
    ]
    if table is not None:
        slower = table.per_step() / row.step_ms_p50
        lines += [
            "",
            f"Rank 0 under the profiler, {table.steps} steps, {slower:.2f} times the time of one "
            "without it; a host that is slowed down by it shows as idle.",
            "",
            timeline.markdown(table),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _for_measurement(config: Config, options: argparse.Namespace, world: World) -> Config:
    """The configuration with the batch of this machine, and nothing written but its description."""
    micro = options.micro_batch or config.optimizer.max_micro_batch
    changes = [
        f"optimizer.max_micro_batch={micro}",
        f"optimizer.global_batch_size={micro * options.accumulation * world.size}",
        f"folder={options.out / 'runs'}",
        "logging.pictures=false",
    ]
    return load_config(options.config, [*options.overrides, *changes])


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[4], cuts[8]


def _peak_memory(device: torch.device) -> int:
    """Bytes of the fullest rank: allocated on a GPU, resident on a CPU (a collective)."""
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.tensor(own, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument(
        "--micro-batch", type=int, help="images per GPU (default: optimizer.max_micro_batch)"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--profile", type=int, default=2, help="profiled steps; 0: no table")
    parser.add_argument(
        "--gather-steps", type=int, default=0, help="timed steps with DCNv3's gather kernels alone"
    )
    parser.add_argument("--twice", type=int, default=0, help="timed steps that are computed twice")
    parser.add_argument(
        "--cubins",
        type=pathlib.Path,
        metavar="FOLDER",
        help="DCNv3's matrix kernels, of kernels/bench/matrix_check.py --compile",
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="changes to the file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
