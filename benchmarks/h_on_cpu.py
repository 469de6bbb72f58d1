"""InternImage-H with the whole objective on a machine without a GPU: train, resume, export.

    make h-on-cpu        (or: python benchmarks/h_on_cpu.py [--steps N] [a.b=value ...])

Two processes, one after the other, train `--steps` steps each with `configs/h_on_cpu.yaml`: the
first from the start to a checkpoint, the second from there on. Then `m3i export` writes the
teacher averages of the backbone, and a table shows what the second process held in memory beside
what `m3i plan` predicts. Needs the data that `make demo` draws (`make h-on-cpu` draws it too).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIG = "configs/h_on_cpu.yaml"


def main() -> int:
    """Run everything; the child processes come back here with --train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--steps", type=int, default=2, help="of each process (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep checkpoint and exported file")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args()
    if options.train:
        return train(options)

    from m3i_scale.config import load_config

    folder = load_config(options.config, options.overrides).run_folder
    shutil.rmtree(folder, ignore_errors=True)
    same = ["--config", options.config, "--steps", str(options.steps), *options.overrides]
    # Large blocks straight from the system and back: sharding the networks would leave gigabytes of
    # holes in glibc's heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for _ in range(2):
        subprocess.run([sys.executable, __file__, "--train", *same], check=True, env=environment)
    exported = folder / "backbone.safetensors"
    started = time.perf_counter()
    export = ["export", "--run", str(folder), "--which", "teacher", "--dtype", "bf16"]
    subprocess.run(
        [sys.executable, "-m", "m3i_scale.cli", *export, "--out", str(exported)], check=True
    )
    print(f"exported {exported.stat().st_size / 1e9:.2f} GB, {seconds_since(started)}")
    compare(options, folder)
    if not options.keep:
        shutil.rmtree(folder / "checkpoints")
        exported.unlink()
    return 0


def train(options: argparse.Namespace) -> int:
    """Some steps from wherever the run stands, and a checkpoint."""
    from m3i_scale.cluster import launch
    from m3i_scale.config import load_config
    from m3i_scale.engine import loop, memory, session
    from m3i_scale.tasks.pretraining import Pretraining

    config = load_config(options.config, options.overrides)
    world = launch.start("cpu", config.engine.precision, config.seed, 60)
    launch.setup_logging(world.rank)
    task = Pretraining(config)
    stream = task.open_stream()
    before = peak_memory()
    started = time.perf_counter()
    run = session.open_run(task, world, stream, epoch_samples=stream.samples, resume="auto")
    print(
        f"step {run.progress.step}: ready, {seconds_since(started)}, "
        f"at most {peak_memory() / 2**30:.1f} GiB so far",
        flush=True,
    )
    batches, losses = loop.open_batches(run), []
    for _ in range(options.steps):
        values, updated = loop.train_step(run, batches)
        assert updated, "a gradient was not finite"
        losses.append(values["loss/total"])
        print(
            f"step {run.progress.step}: loss {values['loss/total']:.4f}, "
            f"{values['step_seconds']:.1f} s, at most {peak_memory() / 2**30:.1f} GiB so far",
            flush=True,
        )
        run.progress.step += 1
        run.progress.position += run.split.batch
    figures = {
        "step": run.progress.step,
        "losses": losses,
        "held": memory.held_memory(run.sharded),
        "peak before the networks": before,
        "peak": peak_memory(),
    }
    started = time.perf_counter()
    loop.save(run)
    assert run.saver.finish(), "the checkpoint could not be written"
    print(f"saved, {seconds_since(started)}", flush=True)
    (run.folder / f"memory-{run.progress.step:08d}.json").write_text(json.dumps(figures, indent=1))
    launch.finish()
    return 0


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Print measured bytes by kind beside those of the plan."""
    from m3i_scale.config import load_config
    from m3i_scale.planner.estimate import Cluster, make_plan, trace_of
    from m3i_scale.planner.gpus import gpu

    config = load_config(options.config, options.overrides)
    # Of the first process and of the one that went on.
    first, second = (json.loads(path.read_text()) for path in sorted(folder.glob("memory-*.json")))
    # One rank; of the GPU only the time would depend.
    traced = trace_of(config)
    plan = make_plan(config, traced, Cluster(gpu("h100"), 1, 1))
    held, planned = second["held"], plan.state
    passing = max(sum(plan.passing.values()), plan.update)
    rows = [(kind, held[kind], planned[kind]) for kind in held]
    rows.append(("in all", sum(held.values()), sum(planned.values())))
    expected = first["peak before the networks"] + sum(planned.values()) + passing
    rows.append(("largest resident size", first["peak"], expected))
    print("| GB | measured | planned |\n| --- | ---: | ---: |")
    for name, measured, expected in rows:
        print(f"| {name} | {measured / 1e9:.3f} | {expected / 1e9:.3f} |")
    print(
        f"The process that went on: at most {second['peak'] / 1e9:.3f} GB, with pages of the "
        "checkpoint's files, which the system takes back when it needs them."
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_since(started: float) -> str:
    """Elapsed time for people."""
    return f"{time.perf_counter() - started:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
