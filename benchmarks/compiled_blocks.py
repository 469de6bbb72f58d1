"""What torch.compile of the residual blocks changes in a training step (docs/host.md).

    DS_ACCELERATOR=cpu python benchmarks/compiled_blocks.py --config FILE engine.device=cpu

Two runs of one configuration on random batches, one with `torch.compile` around the forward pass of
every block that ZeRO gathers as a whole, and of the whole teacher's, make their steps in turn.
Prints the first step's seconds (with compilation), medians of the others, their ratio, and by how
much losses and gradient norms differ. One process, one device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import synthetic
import torch
from m3i_kernels import set_backend

from m3i_scale.cluster import launch
from m3i_scale.config import Config, load_config
from m3i_scale.models.layers import residual_blocks


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, ["logging.pictures=false", *options.overrides])
    world = launch.start(config.engine.device, config.engine.precision, config.seed, 60.0)
    set_backend(config.engine.kernels)
    # After `launch.start`: it imports deepspeed.
    from m3i_scale.engine import loop

    runs = {
        name: _open(config, world, compiled=name == "compiled") for name in ("eager", "compiled")
    }
    batches = {name: loop.open_batches(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.steps):
        values = {}
        for name, run in runs.items():
            began = time.perf_counter()
            values[name], _ = loop.train_step(run, batches[name])
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
            run.progress.step += 1
        apart = [
            abs(values["compiled"][key] / values["eager"][key] - 1)
            for key in ("loss/total", "gradient/all_parameters")
        ]
        print(f"step {number}: loss differs by {apart[0]:.1e}, gradient norm by {apart[1]:.1e}")
    medians = {name: statistics.median(taken[2:]) for name, taken in seconds.items()}
    pairs = zip(seconds["eager"][2:], seconds["compiled"][2:], strict=True)
    ratio = statistics.median(eager / compiled for eager, compiled in pairs)
    print(f"first steps {seconds['eager'][0]:.1f} s eager, {seconds['compiled'][0]:.1f} s compiled")
    print(f"medians {medians['eager']:.3f} s eager, {medians['compiled']:.3f} s compiled")
    print(f"eager over compiled, median of pairs: {ratio:.2f}")
    launch.finish()
    return 0


def _open(config: Config, world: launch.World, *, compiled: bool):  # type: ignore[no-untyped-def]
    from m3i_scale.engine import session
    from m3i_scale.tasks.pretraining import Pretraining

    stream = synthetic.SyntheticStream(config)
    run = session.open_run(
        Pretraining(config), world, stream, epoch_samples=stream.epoch_samples, resume="never",
        write=False,
    )  # fmt: skip
    if compiled:
        networks = run.sharded.model
        blocks = list(run.task.leaves(networks))
        blocks += [block for _, block in residual_blocks(networks.teacher)]  # type: ignore[arg-type]
        for block in dict.fromkeys(blocks):
            # The forward pass alone: ZeRO's hooks, around it, stay in Python.
            block.forward = torch.compile(block.forward, dynamic=False)
    return run


if __name__ == "__main__":
    sys.exit(main())
