"""Host time of a training step: what Python costs, on any number of ranks, on one CPU core.

    python benchmarks/host_time.py --ranks 160 [--config FILE] [--steps N] [--json] [a.b=value ...]

Runs the real `train_step` of a configuration in a process group that has the wanted number of ranks
and sends nothing. The networks have all modules and parameters of the configuration (InternImage-H
by default), but narrow layers, two small images and few words, so that next to nothing is computed
and what remains is the time that Python and the dispatch of operators take. ZeRO's stage is that of
the configuration (`engine.zero.stage=1`). What ZeRO decides by size is decided by the sizes of the
real networks: the same parameters stay gathered, and buckets hold the same share of all parameters.

Seconds are CPU seconds of the main thread (on one core the backward pass runs there too), which
other processes do not disturb. They are a lower bound for a GPU's host: launching a kernel costs
more than calling the CPU's. With `--device cuda` they are wall-clock seconds; with `--full` the
networks keep their widths, images and micro-batch, which needs a GPU.

Printed are seconds of the steps, the parts of the last step (each without the parts it calls), the
collectives between the optimiser's update and the end of the step, and by how much DeepSpeed's
stack of modules grows in a micro-step, which must be 0. `--json` prints one object instead:

    seconds_per_step         median of the steps after the second
    second_step_seconds      the step in which DeepSpeed first uses the order of modules
    collectives_after_step   between the optimiser's update and the end of `train_step`
    module_stack_growth      entries per micro-step
    parts                    seconds by part, of the last step; networks_alone is the forward and
                             backward pass without ZeRO, measured apart
    overrides, origin        changes to the configuration; processor, versions, commit

`host_fit.py` makes the host's part of `m3i plan` of such objects.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from origin import origin

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "pretrain_internimage_h.yaml"
MICRO_BATCH = 2

# Method -> the part of a step that it belongs to. A method that is not there in the installed
# DeepSpeed is an error: the table would be wrong without a word.
ZERO = "deepspeed.runtime.zero."
COMMON = {
    "m3i_scale.engine.momentum:Teacher": {"update": "EMA"},
    "m3i_scale.engine.metrics:Figures": {"reduce": "figures"},
    "deepspeed.runtime.engine:DeepSpeedEngine": {
        "forward": "forward",
        "backward": "backward",
        "step": "rest of the engine's step",
    },
}
STAGE_3 = {
    ZERO + "partitioned_param_coordinator:PartitionedParameterCoordinator": {
        "fetch_sub_module": "hooks",
        "release_sub_module": "hooks",
        "reset_step": "hooks",
        "_PartitionedParameterCoordinator__all_gather_params": "gathers",
    },
    ZERO + "partition_parameters:AllGatherHandle": {"wait": "gathers"},
    ZERO + "partition_parameters:MultipleAllGatherHandles": {"wait": "gathers"},
    ZERO + "stage3:DeepSpeedZeroOptimizer_Stage3": {
        "reduce_ready_partitions_and_remove_grads": "reduce-scatter",
        "independent_gradient_partition_epilogue": "reduce-scatter",
        "_partition_all_parameters": "release before the update",
        "_get_norm_groups": "norms",
        "_prepare_sub_group": "optimiser",
        "unscale_and_clip_grads": "optimiser",
        "_optimizer_step": "optimiser",
        "_reassign_or_swap_out_partitioned_parameters": "optimiser",
        "_post_step": "post-step",
        "step": "rest of ZeRO's step",
    },
}
STAGES_1_AND_2 = {
    ZERO + "stage_1_and_2:DeepSpeedZeroOptimizer": {
        "process_gradients": "hooks",
        "reduce_ipg_grads": "all-reduce",
        "independent_gradient_partition_epilogue": "all-reduce",
        "check_overflow": "norms",
        "scaled_global_norm": "norms",
        "_optimizer_step": "optimiser",
        "step": "rest of ZeRO's step",
    },
}


class Finding(NamedTuple):
    """What one run has shown."""

    config: str
    stage: int  # of ZeRO
    ranks: int
    device: str
    accumulation: int
    parameters: dict[str, int]  # tensors: trained, of the teacher, kept gathered
    seconds_per_step: float
    second_step_seconds: float
    steps: list[float]
    collectives_per_step: int
    collectives_after_step: int
    module_stack_growth: float
    parts: dict[str, float]
    overrides: list[str]
    origin: dict[str, str]  # processor, versions, commit


# ---------------------------------------------------------------------------------- process group


def join_silent_group(ranks: int) -> Counter[str]:  # noqa: C901  one method per collective
    """Make this process rank 0 of a group that sends nothing; returns the count of its collectives.

    What is gathered is this rank's own contribution and zeros for the others': finite.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import _create_work_from_future

    counts: Counter[str] = Counter()

    # Its methods take any arguments: torch's versions differ in them.
    base: Any = dist.ProcessGroup

    class Silent(base):
        def getBackendName(self) -> str:  # noqa: N802  torch's name
            return "silent"

        def _done(self, name: str, result: Any) -> Any:
            counts[name] += 1
            future: torch.futures.Future[Any] = torch.futures.Future()
            future.set_result(result)
            return _create_work_from_future(future)

        def all_gather_single(self, output: Any, local: Any, *_: Any, **__: Any) -> Any:
            own = local.reshape(1, -1).clone()  # it may be a part of the output
            table = output.view(self.size(), -1).zero_()
            table[:1] = own
            return self._done("all-gather", output)

        def allgather(self, outputs: Any, local: Any, *_: Any, **__: Any) -> Any:
            for parts, part in zip(outputs, local, strict=True):
                for output in parts:
                    output.copy_(part)
            return self._done("all-gather", outputs)

        def reduce_scatter_single(self, output: Any, whole: Any, *_: Any, **__: Any) -> Any:
            output.copy_(whole.view(self.size(), -1)[0].view_as(output))
            return self._done("reduce-scatter", output)

        def allreduce(self, tensors: Any, *_: Any, **__: Any) -> Any:
            return self._done("all-reduce", tensors)

        def broadcast(self, tensors: Any, *_: Any, **__: Any) -> Any:
            return self._done("broadcast", tensors)

        def barrier(self, *_: Any, **__: Any) -> Any:
            return self._done("barrier", [])

        # The names of the same in torch before 2.14.
        _allgather_base = all_gather_single
        _reduce_scatter_base = reduce_scatter_single

    dist.Backend.register_backend(
        "silent", lambda store, rank, size, timeout: Silent(rank, size), devices=["cpu", "cuda"]
    )
    dist.init_process_group("silent", rank=0, world_size=ranks, store=dist.HashStore())
    return counts


# ---------------------------------------------------------------------------------------- networks


def narrow(config: Any) -> Any:
    """The same modules in narrow layers, on images of 64 pixels and texts of 8 tokens."""
    tree = config.model_dump()
    model, data = tree["model"], tree["data"]
    options = model["backbone"]["options"]
    if config.model.backbone.name.startswith("intern_image"):
        options |= {"channels": 16, "groups": [1, 2, 4, 8], "clip_projector_width": 48}
        options |= {"clip_heads": 4, "clip_embed_dim": 48}
    else:
        options |= {"width": 48, "heads": 4, "pool_heads": 4, "embed_dim": 48}
    model["decoder"] |= {"width": 48, "heads": 4, "ffn": 96}
    model["global_head"] |= {"hidden": 96, "width": 48}
    if model["text"]:
        model["text"] |= {"tokenizer": "none", "vocab_size": 100, "width": 48, "heads": 4}
        model["text"] |= {"ffn": 96, "embed_dim": 48, "max_length": 8}
    model["categories"] = min(model["categories"], 50)
    data["image_size"] = 64
    return type(config).model_validate(tree)


def sizes(config: Any) -> dict[str, int]:
    """Elements of every parameter of a configuration's networks, by name; nothing is allocated."""
    import torch

    from m3i_scale.objective.m3i import M3I

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = M3I(config.model, config.objective, config.data.image_size)
    return {name: p.numel() for name, p in model.named_parameters()}


def scaled(config: Any, real: dict[str, int]) -> Any:
    """ZeRO's buckets hold the same share of the narrow networks as of the real ones."""
    zero = config.engine.zero
    share = sum(sizes(config).values()) / sum(real.values())
    reuse = zero.extra.get("zero_optimization", {}).get("stage3_max_reuse_distance", 1e9)
    fewer = {
        name: max(1, int(share * getattr(zero, name)))
        for name in ("prefetch_bucket", "reduce_bucket", "max_live_parameters")
    }
    extra = {"zero_optimization": {"stage3_max_reuse_distance": int(share * reuse)}}
    engine = config.engine.model_copy(
        update={"zero": zero.model_copy(update={**fewer, "extra": {**zero.extra, **extra}})}
    )
    return config.model_copy(update={"engine": engine})


def keep_gathered(small: set[str]) -> None:
    """Let ZeRO-3 keep the parameters of these names gathered, whatever their narrow size is."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    def mark(self: Any, *_: Any) -> list[Any]:
        for name, parameter in self.module.named_parameters():
            parameter.ds_persist = name in small
        return [p for p in self.module.parameters() if p.ds_persist]

    DeepSpeedZeRoOffload.mark_persistent_parameters = mark


# --------------------------------------------------------------------------------------- measuring


class Clock:
    """Seconds by part, each without the parts that it calls."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # seconds of called parts, for each part that is running

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a method from now on."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*inputs: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            begun = self.now()
            try:
                return method(*inputs, **options)
            finally:
                seconds = self.now() - begun
                self.spent[part] += seconds - self._inside.pop()
                if self._inside:
                    self._inside[-1] += seconds

        setattr(owner, name, timed)


def watch_parts(clock: Clock, stage: int) -> None:
    """Time all methods of a ZeRO stage and of the engine."""
    import importlib

    for place, methods in (COMMON | (STAGE_3 if stage == 3 else STAGES_1_AND_2)).items():
        module, name = place.split(":")
        owner = getattr(importlib.import_module(module), name)
        for method, part in methods.items():
            clock.watch(owner, method, part)


def networks_alone(config: Any, world: Any, stream: Any, clock: Clock) -> float:
    """Seconds of a forward and a backward pass of the plain networks; the better of two."""
    import torch

    from m3i_scale.models.precision import DTYPES
    from m3i_scale.objective.collectives import alone
    from m3i_scale.objective.inputs import build_input
    from m3i_scale.objective.m3i import M3I

    dtype = DTYPES[config.engine.precision]
    model = M3I(config.model, config.objective, config.data.image_size).to(world.device, dtype)
    batches = stream.loader(micro_batch=MICRO_BATCH, rank=0, pin_memory=False)
    best = float("inf")
    with alone():
        for _, batch in zip(range(3), batches, strict=False):
            begun = clock.now()
            view = build_input(
                batch.to(world.device),
                config.objective.input,
                mean=config.data.mean,
                std=config.data.std,
                dtype=dtype,
            )
            model(view)["loss"].backward()
            best = min(best, clock.now() - begun)
            model.zero_grad()
    del model
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return best


def measure(options: argparse.Namespace, folder: Path) -> Finding:
    """Run the steps in a silent group."""
    import torch

    torch.set_num_threads(1)
    counts = join_silent_group(options.ranks)
    sys.path.insert(0, str(ROOT / "kernels" / "bench"))
    from synthetic import SyntheticStream

    from m3i_scale.cluster import launch
    from m3i_scale.config import load_config
    from m3i_scale.engine import loop, session
    from m3i_scale.tasks.pretraining import Pretraining

    overrides = [
        "engine.verify.every=null",  # ranks that are not there give wrong results
        "engine.verify.state=false",
        f"folder={folder}",
        f"engine.device={options.device}",
        "logging.pictures=false",
        "logging.trackers=[]",
        *options.overrides,
    ]
    micro = options.micro_batch
    overrides.append(f"optimizer.max_micro_batch={micro}")
    overrides.append(f"optimizer.global_batch_size={micro * options.ranks * options.accumulation}")
    config = load_config(options.config, overrides)
    real = sizes(config)
    small = {n for n, size in real.items() if size <= config.engine.zero.persistence_threshold}
    if not options.full:
        config = scaled(narrow(config), real)
    world = launch.start(options.device, config.engine.precision, config.seed, 10)
    keep_gathered(small)

    def now() -> float:
        if world.device.type == "cuda":
            return time.perf_counter()
        return time.thread_time()

    clock = Clock(now)
    watch_parts(clock, config.engine.zero.stage)
    stream = SyntheticStream(config)
    alone = networks_alone(config, world, stream, clock) * options.accumulation
    run = session.open_run(Pretraining(config), world, stream, epoch_samples=10**9, resume="never")
    # Counted from the last update on, that of the last group of parameters.
    inner = run.sharded.engine.optimizer.optimizer
    updated: Counter[str] = Counter()

    def note(*_: Any) -> None:
        updated.clear()
        updated.update(counts)

    inner.register_step_post_hook(note)
    steps, before = [], stack_height()
    batches = loop.open_batches(run)
    for _ in range(options.steps):
        clock.spent.clear()
        counts.clear()
        settle(world.device)
        begun = now()
        _, moved = loop.train_step(run, batches)
        settle(world.device)
        steps.append(now() - begun)
        if not moved:
            raise RuntimeError("a gradient was not finite: nothing was updated")
        run.progress.step += 1
        run.progress.position += run.split.batch
    parts = {
        name: round(s, 4) for name, s in sorted(clock.spent.items(), key=lambda item: -item[1])
    }
    parts["rest of train_step"] = round(steps[-1] - sum(clock.spent.values()), 4)
    names = dict(run.sharded.model.named_parameters())
    return Finding(
        config=os.path.relpath(options.config, ROOT),
        stage=config.engine.zero.stage,
        ranks=options.ranks,
        device=options.device,
        accumulation=options.accumulation,
        parameters={
            "trained": sum(p.requires_grad for p in names.values()),
            "teacher": sum(name.startswith("teacher.") for name in real),
            "kept gathered": sum(getattr(p, "ds_persist", False) for p in names.values()),
        },
        seconds_per_step=round(statistics.median(steps[2:]), 4),
        second_step_seconds=round(steps[1], 4),
        steps=[round(seconds, 4) for seconds in steps],
        collectives_per_step=counts.total(),
        collectives_after_step=(counts - updated).total(),
        module_stack_growth=(stack_height() - before) / (options.steps * options.accumulation),
        parts=parts | {"networks_alone": round(alone, 4)},
        overrides=options.overrides,
        origin=origin(),
    )


def settle(device: Any) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def stack_height() -> int:
    """Entries on DeepSpeed's stack of modules whose forward pass is running."""
    from deepspeed.runtime.zero import parameter_offload

    return len(parameter_offload.FWD_MODULE_STACK)


# ----------------------------------------------------------------------------------------- program


def table(found: Finding) -> Iterator[str]:
    """The lines of the report."""
    counted = ", ".join(f"{number} {kind}" for kind, number in found.parameters.items())
    yield f"{found.config}, {found.ranks} ranks, accumulation {found.accumulation},"
    yield f"    ZeRO stage {found.stage}"
    yield f"parameter tensors: {counted}"
    yield f"seconds of the steps: {' '.join(f'{s:.3f}' for s in found.steps)}"
    yield f"seconds a step (median after the second): {found.seconds_per_step:.3f}"
    yield f"collectives: {found.collectives_per_step} a step, {found.collectives_after_step} of "
    yield f"    them after the update; module stack grows by {found.module_stack_growth:g}"
    for name, seconds in found.parts.items():
        yield f"  {name:28s} {seconds:8.3f}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--steps", type=int, default=5, help="at least 3 (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="even (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--full", action="store_true", help="real widths, images and texts")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args(arguments)
    if options.steps < 3 or options.ranks < 1 or options.accumulation < 1:
        parser.error("--steps must be at least 3, --ranks and --accumulation at least 1")
    if options.micro_batch < 2 or options.micro_batch % 2:
        parser.error("--micro-batch must be even: two images make a mix")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse(arguments)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = "0"
    os.environ |= {"WORLD_SIZE": str(options.ranks), "DS_ACCELERATOR": options.device}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    speaking = os.dup(1)
    os.dup2(2, 1)  # what DeepSpeed prints shall not stand in the JSON
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    sys.stdout.flush()
    os.dup2(speaking, 1)
    print(json.dumps(found._asdict()) if options.json else "\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
